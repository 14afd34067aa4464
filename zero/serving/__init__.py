"""``zero serve``: a model behind HTTP, for programs and for people.

Requests come in on asyncio's thread (``app``), wait in a bounded queue (``service``) and are answered by the one thread
that runs passes through the model (``worker``).
"""

from __future__ import annotations

from zero.serving.app import make_app
from zero.serving.service import Service
from zero.serving.settings import ServingSettings
from zero.serving.worker import Loaded, Memory

__all__ = ["Loaded", "Memory", "Service", "ServingSettings", "make_app"]
