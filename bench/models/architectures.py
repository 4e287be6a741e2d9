"""Architectures that timm does not have, registered with it; import timm from here where one may be named."""

from __future__ import annotations

import timm as timm

from bench.models import transformers_architecture as transformers_architecture
