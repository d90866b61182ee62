"""What can go wrong, each with the exit code a shell or a scheduler sees."""

import errno

# Of an OSError: the disk takes nothing, whatever the file.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


class MegaboatError(Exception):
    """Base of the errors that the command line prints as one line, without a traceback."""

    exit_code = 1


class BadInput(MegaboatError):
    """The user can mend it: a misspelt key, a missing file, numbers that do not fit together."""

    exit_code = 2


class DamagedData(MegaboatError):
    """A shard, checkpoint or export is not what its index or manifest says."""

    exit_code = 3


class Diverged(MegaboatError):
    """The loss or the gradient is no longer a finite number."""

    exit_code = 4
