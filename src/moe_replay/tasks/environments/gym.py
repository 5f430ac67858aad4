"""ms-swift's form of an environment, as one that is stepped.

Its class takes a table of settings, and its methods may be async::

    reset(config) -> (observation, info, system message)
    step(messages) -> (observation, reward, done, info)
    close()

The rewards of all steps are added up. Source: ms-swift, ``Env`` (``swift/plugin/env.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any


class GymAdapter:
    """One environment of that form; ``reset`` gives the chat that a conversation begins with."""

    def __init__(self, make: Callable[..., Any], args: Mapping[str, Any]) -> None:
        self._make, self._args = make, dict(args)
        self._inner: Any = None
        self._messages: list[dict[str, str]] = []
        self._reward = 0.0

    @property
    def inner_step(self) -> Callable[..., Any]:
        """The method of the environment itself."""
        return self._inner.step

    async def reset(self, **row: Any) -> list[dict[str, str]]:
        """Begin; return the system message, if any, and the observation as a user message."""
        self._inner, self._reward = self._make(dict(self._args)), 0.0
        prompt = row.get("prompt")
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        config = SimpleNamespace(messages=messages, data_dict=row)
        observation, _, system = await _value(self._inner.reset(config))
        head = [{"role": "system", "content": str(system)}] if system else []
        self._messages = [*head, {"role": "user", "content": str(observation)}]
        return [dict(message) for message in self._messages]

    async def step(self, text: str) -> str | None:
        """Take the model's message; return the next observation, or None at the end."""
        self._messages.append({"role": "assistant", "content": text})
        given = [dict(message) for message in self._messages]
        observation, reward, done, _ = await _value(self._inner.step(given))
        self._reward += float(reward)
        if done:
            return None
        self._messages.append({"role": "user", "content": str(observation)})
        return str(observation)

    def get_reward(self) -> float:
        """Return the rewards so far, added up."""
        return self._reward

    async def close(self) -> None:
        """Close the environment, if it has begun and can be closed."""
        if self._inner is not None and hasattr(self._inner, "close"):
            await _value(self._inner.close())


async def _value(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result
