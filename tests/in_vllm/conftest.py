"""These tests run in vLLM, in an environment of its own: `make test-vllm`. Elsewhere none is collected."""

from __future__ import annotations

import importlib.util
import os

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("vllm") is None else []

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
