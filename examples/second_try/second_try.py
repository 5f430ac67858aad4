"""The environment of the example: reasoning-gym's question once more after a wrong answer."""

import reasoning_gym
from reasoning_gym.utils import extract_answer

SCORE = reasoning_gym.get_score_answer_fn("chain_sum")


class SecondTry:
    """A right first answer earns 1, a right second one half of it."""

    def reset(self, *, question, answer, metadata):
        """Begin with the dataset's question."""
        self.item = {"question": question, "answer": answer, "metadata": metadata}
        self.tries, self.reward = 0, 0.0

    def step(self, text):
        """Take an answer; return the question after a wrong first one, or None at the end."""
        self.tries += 1
        if SCORE(extract_answer(text), self.item) == 1.0:
            self.reward = 1.0 / self.tries
        return self.item["question"] if not self.reward and self.tries == 1 else None

    def get_reward(self):
        """Return what the answers earned."""
        return self.reward
