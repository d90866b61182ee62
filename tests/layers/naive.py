"""SeqBoat's equations in numpy, one token at a time: written from the paper's mathematics, not from the library.

Each function reads one document, from its first token, in fp64. `w` maps the library's parameter names to arrays; the
names in the code are the paper's. Documents are told apart by calling these functions once for each.
"""

import numpy as np
import torch
from torch import nn

Weights = dict[str, np.ndarray]


def weights(module: nn.Module) -> Weights:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def under(prefix: str, w: Weights) -> Weights:
    return {name.removeprefix(prefix): array for name, array in w.items() if name.startswith(prefix)}


@torch.no_grad()
def randomize(module: nn.Module, seed: int, spread: float = 0.5) -> nn.Module:
    """fp64 and every parameter far from its start, where queries and keys are nearly zero and errors would not show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.normal_(0, spread, generator=generator)
    return module


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def linear(name: str, w: Weights, x: np.ndarray) -> np.ndarray:
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def layer_norm(x: np.ndarray, scale: np.ndarray | float = 1.0, shift: np.ndarray | float = 0.0) -> np.ndarray:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def damped_ema(X: np.ndarray, w: Weights) -> np.ndarray:
    """1.2: h_t = q h_{t-1} + p beta x_t and y_t = N^(-1/2) sum_k gamma_k h_t,k + omega x_t, channel by channel."""
    T, D = X.shape
    N = w["smoothing"].shape[1]
    Y = np.zeros((T, D))
    for j in range(D):
        h = [0.0] * N
        for t in range(T):
            y = w["skip"][j] * X[t, j]
            for k in range(N):
                p, a = sigmoid(w["smoothing"][j, k]), sigmoid(w["damping"][j, k])
                q, beta, gamma = 1 - p * a, w["expansion"][j, k], w["projection"][j, k]
                h[k] = q * h[k] + p * beta * X[t, j]
                y += gamma * h[k] / np.sqrt(N)
            Y[t, j] = y
    return Y


def decide(h: np.ndarray, w: Weights, module: int) -> tuple[bool, float]:
    """1.4: m = 1[argmax U = 1], c = m softmax(U / tau)_1 for one token and one of the modules."""
    U = linear("logits", w, h)[2 * module : 2 * module + 2]
    tau = np.exp(w["log_temperature"][module])
    P = np.exp(U / tau) / np.exp(U / tau).sum()
    return (True, P[1]) if U[1] > U[0] else (False, 0.0)


def rotary(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """Interleaved pairs as complex numbers, turned by position * base^(-2i/Z)."""
    Z = len(x)
    turned = np.empty(Z)
    for i in range(Z // 2):
        pair = complex(x[2 * i], x[2 * i + 1]) * np.exp(1j * position * base ** (-2 * i / Z))
        turned[2 * i], turned[2 * i + 1] = pair.real, pair.imag
    return turned


def attend(q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]) -> np.ndarray:
    """Softmax of z^(-1/2) q k over the keys given, and the average of their values."""
    score = [float(q @ k) / np.sqrt(len(q)) for k in keys]
    weight = [np.exp(s - max(score)) for s in score]
    return sum(a * v for a, v in zip(weight, values, strict=True)) / sum(weight)


def gated_attention(H: np.ndarray, positions: list[int], w: Weights, window: int, base: float) -> np.ndarray:
    """1.1 (6)-(9) and 1.6 over the activated rows of a document: each sees itself and the `window` rows before it."""
    heads = len(w["scale_q"])
    A, memory = [], []
    for h, position in zip(H, positions, strict=True):
        Z, R, V = silu(linear("z", w, h)), silu(linear("r", w, h)), silu(linear("v", w, h))
        of_queries, of_keys = (Z, Z) if len(Z) == w["scale_q"].shape[1] else np.split(Z, 2)
        K = [rotary(of_keys * w["scale_k"][g] + w["bias_k"][g], position, base) for g in range(heads)]
        memory = [*memory, (K, np.split(V, heads))][-(window + 1) :]
        averages = []
        for g in range(heads):
            Q = rotary(of_queries * w["scale_q"][g] + w["bias_q"][g], position, base)
            averages.append(attend(Q, [k[g] for k, _ in memory], [v[g] for _, v in memory]))
        A.append(linear("o", w, np.concatenate(averages) * R))
    return np.array(A)


def paper_layer(S: np.ndarray, w: Weights, window: int, base: float = 1e4) -> tuple[np.ndarray, np.ndarray]:
    """1.1, decoder form: the layer's output S' (T, D) and its decisions m (T, M)."""
    X = np.array([layer_norm(s, w["norm.weight"], w["norm.bias"]) for s in S])
    H = silu(damped_ema(X, under("ema.", w)))
    router = under("sma.configurator.", w)
    M = len(router["log_temperature"])
    decisions = [[decide(h, router, i) for i in range(M)] for h in H]
    G = np.zeros_like(S)
    for i in range(M):
        active = [t for t in range(len(S)) if decisions[t][i][0]]
        A = gated_attention(H[active], active, under(f"sma.units.{i}.", w), window, base)
        for row, t in enumerate(active):
            G[t] += decisions[t][i][1] * A[row]
    Hx = np.array([linear("linear", w, h) for h in H])
    return silu(Hx + G + S), np.array([[m for m, _ in token] for token in decisions])


def paper_logits(tokens: list[int], w: Weights, window: int) -> np.ndarray:
    """The whole model over one document: scaled embedding, layers, final norm without affine, tied head."""
    E = w["embedding.weight"]
    S = E[tokens] * np.sqrt(E.shape[1])
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(layers):
        S, _ = paper_layer(S, under(f"blocks.{i}.", w), window)
    return np.array([E @ layer_norm(s) for s in S])
