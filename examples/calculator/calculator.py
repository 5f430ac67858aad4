"""The environment of the example: a calculator with one tool."""


class Calculator:
    """One conversation with a calculator; the reward is whether the last turn gives the product."""

    def reset(self) -> None:
        """Begin a conversation, which has no state."""

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: first factor
            b: second factor
        """
        if not (isinstance(a, int) and isinstance(b, int)):
            raise TypeError("a and b must be whole numbers")
        return a * b
