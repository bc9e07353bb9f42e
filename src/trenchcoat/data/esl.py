"""Effective sequence length: how far back a model's attention looks in a text (LoLCATs, arXiv 2410.10254, equation 9).

    ESL(q_i) = sum_j (i - j) a_ij        averaged over heads, layers and positions: one number per text, in tokens

One forward pass of the unchanged model over the text. Each layer's attention rows are recomputed in blocks of queries,
in float32, and reduced at once: no full attention map is ever in memory, and the pass itself runs the model's own
attention. ``EslRanking`` does it for the samples of a data set and caches the numbers on disk.

Shapes: B rows, H query heads, G key/value heads, n queries of a block, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trenchcoat.data.table import TokenTable
from trenchcoat.models.attach import attention_through
from trenchcoat.models.interface import LazyMask, Output, own_attention
from trenchcoat.models.softmax_rows import softmax_rows
from trenchcoat.models.transformers_internals import score_options
from trenchcoat.runtime import distributed
from trenchcoat.runtime.files import CorruptFileError, SaveError, load_tensors, save_tensors
from trenchcoat.runtime.runlog import RunLog
from trenchcoat.runtime.sharding import compute_device, run_decoder

BATCH_TOKENS = 4096
"""Tokens of a forward pass over short samples."""
SAVE_EVERY = 1024
"""Samples between two saves of the ranking."""
_VERSION = 2


def layer_esl(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    seen: Callable[[int, int], Tensor],
    real_BT: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """Mean ESL over heads and real positions of one layer, float64 [B].

    ``seen(start, stop)`` tells which keys those queries see (bool, broadcastable to [B, H, n, T]); ``real_BT`` is False
    at padding. A sink logit [H] takes its share of each row's weight and adds no distance.
    """
    batch, heads, tokens, _ = q_BHTD.shape
    place = torch.arange(tokens, device=q_BHTD.device)
    total_B = torch.zeros(batch, dtype=torch.float64, device=q_BHTD.device)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logit": sink_logit}
    for start, stop, weight_BHnt in softmax_rows(q_BHTD, k_BGTD, seen, **options):
        distance = (place[start:stop, None] - place[:stop]).float()
        esl_Bn = torch.einsum("bhnt,nt->bn", weight_BHnt, distance)
        total_B += esl_Bn.double().masked_fill(~real_BT[:, start:stop], 0.0).sum(1)
    return total_B / (heads * real_BT.sum(1).clamp_min(1))


class _Observer:
    """The attention function of one forward pass: the model's own, and the layers' numbers are collected."""

    def __init__(self, real_BT: Tensor) -> None:
        self.real_BT = real_BT
        self.layers: list[Tensor] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, seen: LazyMask, **kwargs: Any
    ) -> Output:
        """The model's own output; adds the numbers of one layer."""
        device, scaling = query.device, kwargs.get("scaling")
        found = layer_esl(
            query.detach(),
            key.detach(),
            lambda start, stop: seen.block(start, stop).to(device),
            self.real_BT.to(device),
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            **score_options(kwargs),
        )
        self.layers.append(found.cpu())
        return own_attention(module, query, key, value, seen, **kwargs)


def effective_lengths(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """ESL of each row, averaged over all layers, heads and real positions: float64 [B], in tokens.

    ``ids_BT`` int64; ``mask_BT`` is 0 at padding (either side), None for no padding. The model must have no students;
    it is put into evaluation mode. Raises ``UnsupportedFamilyError`` for a model without softmax attention to observe.
    """
    device = compute_device(model)
    ids_BT = ids_BT.to(device)
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT.to(device)
    observer = _Observer(mask_BT.bool())
    model.eval()
    with attention_through(model, observer) as sites, torch.no_grad():
        run_decoder(model, input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    if len(observer.layers) != len(sites):
        raise RuntimeError(f"the forward pass ran {len(observer.layers)} attentions of {len(sites)}")
    return torch.stack(observer.layers).mean(0)


class EslRanking:
    """Scores of pieces of samples for ``data.select``: ESL over each one's ``seq_len`` tokens, cached in ``folder``.

    ``model`` returns the unchanged model and is called only when a score is missing; ``base`` is its fingerprint.
    Scores are saved every ``SAVE_EVERY`` samples, so an interrupted pass resumes where it stopped.
    """

    def __init__(self, model: Callable[[], Any], base: str, *, seq_len: int, folder: Path, log: RunLog) -> None:
        self._model, self._base, self._seq_len, self._folder, self._log = model, base, seq_len, folder, log
        self._scores: dict[str, NDArray[np.float64]] = {}

    def __call__(self, key: str, table: TokenTable, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scores of ``rows`` [r] of the table with content hash ``key``."""
        path = self._folder / "esl" / f"{key}-{self._base}-{self._seq_len}-{_VERSION}.safetensors"
        if key not in self._scores:  # all processes use what one of them has read
            self._scores[key] = distributed.from_main(lambda: _read(path, table.rows))
        scores = self._scores[key]
        missing = rows[np.isnan(scores[rows])]
        if len(missing):
            self._score(path, table, scores, missing, len(rows))
        return scores[rows]

    def _score(
        self, path: Path, table: TokenTable, scores: NDArray[np.float64], missing: NDArray[np.int64], total: int
    ) -> None:
        model = self._model()
        done = saved = total - len(missing)
        self._log.info(f"ranking {len(missing)} rows by effective sequence length, with the model's own attention")
        with self._log.progress("esl", total, done) as display:
            for batch in _batches(table, missing, self._seq_len):
                scores[batch] = effective_lengths(model, *_padded(table, batch, self._seq_len)).numpy()
                done += len(batch)
                display.update(done, mean=float(np.nanmean(scores)))
                if done - saved >= SAVE_EVERY or done == total:
                    self._save(path, scores)
                    saved = done

    def _save(self, path: Path, scores: NDArray[np.float64]) -> None:
        if not distributed.is_main():
            return
        try:
            save_tensors(path, {"esl": torch.from_numpy(scores)})
        except SaveError as error:
            self._log.warning(f"the ranking is not cached, set data.cache_dir: {error}")


def _read(path: Path, rows: int) -> NDArray[np.float64]:
    """Cached scores; NaN where missing."""
    try:
        kept: NDArray[np.float64] = load_tensors(path)["esl"].numpy().copy()
        if kept.shape == (rows,):
            return kept
    except (FileNotFoundError, NotADirectoryError, CorruptFileError, KeyError):
        pass
    return np.full(rows, np.nan)


def _batches(table: TokenTable, rows: NDArray[np.int64], seq_len: int) -> Iterator[NDArray[np.int64]]:
    """Rows of similar length together, the longest first; a batch has one row, or at most ``BATCH_TOKENS`` tokens."""
    lengths = np.minimum(np.diff(table.offsets)[rows], seq_len)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(rows):
        count = max(1, BATCH_TOKENS // max(1, int(lengths[order[start]])))
        yield rows[order[start : start + count]]
        start += count


def _padded(table: TokenTable, rows: NDArray[np.int64], seq_len: int) -> tuple[Tensor, Tensor]:
    """ids [B, T] and mask [B, T] of the first tokens of ``rows``, padded on the right."""
    firsts, stops = table.offsets[rows], table.offsets[rows + 1]
    lengths = np.minimum(stops - firsts, seq_len)
    ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    real = np.arange(ids.shape[1]) < lengths[:, None]
    for i, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        ids[i, :length] = table.tokens[first : first + length]
    return torch.from_numpy(ids), torch.from_numpy(real.astype(np.int64))
