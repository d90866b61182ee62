"""What a demanding user checks in the first hour."""
