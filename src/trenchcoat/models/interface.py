"""The interface to Transformers: an attention function, a mask function and a hook, all named `trenchcoat`.

A model whose config names `trenchcoat` as its attention calls :func:`linearized_attention` with q, k, v after RoPE and
norms. What happens depends on the `student` submodule of that layer:

* none, or mode `teacher`: the model's own implementation, on its own mask;
* `transfer`: the same, and the student learns alongside it, layer by layer;
* `student`: the student's output. Where some groups keep softmax attention, the student has the other heads only:
  the kept ones run the model's own implementation over the whole past, and both outputs are joined in head order.
  With `student.kept_log_scale` queries of kept heads are multiplied first, in layers without a student too.

The mask function returns a :class:`LazyMask`, which holds the 2-D padding (for students) and can still build exactly
the mask that the model's own implementation would have received.

Shape legend: B rows, H query heads, G key/value heads, T tokens, D key dim, E value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from trenchcoat.models.cache import RECORDED, Replay, StateLayer, state_layer
from trenchcoat.models.kept import Columns
from trenchcoat.models.transformers_internals import (
    attention_function,
    attention_name,
    cached_request,
    first_query,
    has_position_bias,
    kept_request,
    make_mask,
    mask_rows,
    more_than_causal,
    of_heads,
    padding_mask,
    register_attention,
    remember_recording,
    score_options,
)
from trenchcoat.ops.compiled.decode import Kept
from trenchcoat.students import RowState, StudentAttention
from trenchcoat.students.heads import KeptHeads

ATTENTION_NAME = "trenchcoat"
"""Name under which the attention and mask functions are registered."""

CALL_NAME = "trenchcoat_call"
"""Name of the attention that calls the attribute `attention_call` of its layer; see `attach.attention_through`."""

LOG_SCALE = "kept_log_scale"
"""Attribute of a layer's attention module: `student.kept_log_scale` while softmax attention of its heads is scaled."""

_CACHE, _INPUT = "trenchcoat_state", "trenchcoat_input"
"""Keywords that carry a layer's state, and its input for a student that reads it, from the hook, through `self_attn`,
to the attention function."""

Output = tuple[Tensor, Tensor | None]
QKV = tuple[Tensor, Tensor, Tensor]


class LazyMask:
    """Padding for students, and on demand the mask of the model's own implementation.

    It is passed through the model unchanged, in place of a mask tensor.
    """

    ndim = 4
    """Tells `generate()` that the mask is already prepared."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = kept_request(request)
        self._teacher: dict[tuple[Any, ...], Any] = {}
        self._padding: dict[int, Tensor | None] = {}
        self._log_scale: dict[tuple[float, int], Tensor] = {}

    @property
    def custom(self) -> bool:
        """More than causality, a window and padding: packed sequences, or a custom mask of the model."""
        return more_than_causal(self._request)

    def padding(self, tokens: int) -> Tensor | None:
        """True at the non-padding ones of the newest `tokens` columns, bool [B, tokens]; None when all are real."""
        if tokens not in self._padding:
            mask = padding_mask(self._request)
            part = None if mask is None else mask[:, -tokens:].bool()
            self._padding[tokens] = None if part is None or bool(part.all()) else part
        return self._padding[tokens]

    def log_scale(self, base: float, tokens: int) -> Tensor:
        """ln(t + base) / ln(base) in the newest `tokens` columns, t being the number of real tokens before each:
        float64 [1 or B, 1, tokens, 1]."""
        if (base, tokens) not in self._log_scale:
            mask, stop = padding_mask(self._request), first_query(self._request) + tokens
            if mask is None:
                places = torch.arange(stop - tokens, stop, device=self._request.get("device"))[None]
            else:  # a mask of the newest columns alone: those before are real
                places = (mask.long().cumsum(1)[:, -tokens:] + max(0, stop - mask.shape[1]) - 1).clamp_min(0)
            scale = (places.double() + base).log() / math.log(base)
            self._log_scale[base, tokens] = scale[:, None, :, None]
        return self._log_scale[base, tokens]

    def teacher(self, implementation: str, columns: Columns | None = None) -> Any:
        """What `implementation` would have received; for a cache of kept groups, over its `columns`."""
        place = None if columns is None else (columns.length, columns.offset, columns.real_BN is None)
        key = (implementation, place)
        if key not in self._teacher:
            request = self._request
            if columns is not None:
                sizes = (columns.length, columns.offset, columns.query_offset)
                request = cached_request(request, *sizes, columns.real_BN)
            self._teacher[key] = make_mask(implementation, request)
        return self._teacher[key]

    def block(self, start: int, stop: int) -> Tensor:
        """Which keys the queries `start` to `stop` see, in every row: bool [B, 1, stop - start, keys]."""
        return mask_rows(self._request, start, stop)

    def contiguous(self) -> LazyMask:
        """Returns itself (`generate()` calls this on masks)."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        """Returns itself: tensors are moved where they are used."""
        return self


def mask(**request: Any) -> LazyMask:
    """The registered mask function; see :class:`LazyMask`."""
    given = padding_mask(request)
    return given if isinstance(given, LazyMask) else LazyMask(request)


def linearized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Output:
    """The registered attention function: q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] -> (y [B, T, H, E], None)."""
    layer: StateLayer | None = kwargs.pop(_CACHE, None)
    hidden: Tensor | None = kwargs.pop(_INPUT, None)
    student = student_of(module)
    base: float | None = getattr(module, LOG_SCALE, None)
    if base is not None:
        query = _log_scaled(query, base, attention_mask, None if student is None else student.kept)
    if student is not None and student.replaces_layer:
        _show_attention(student, query, key, value, attention_mask, scaling, kwargs)
    if student is None or student.mode == "teacher" or student.replaces_layer:
        return own_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if has_position_bias(kwargs):
        raise ValueError("this model adds position biases to its attention scores, which students do not support")
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        **score_options(kwargs),
        "mask_BT": _padding(attention_mask, query),
    }
    if hidden is not None:
        options["x_BTM"] = hidden
    own = {"scaling": scaling, "dropout": dropout, **kwargs}
    kept = student.kept
    if kept is not None and options["sink_logit"] is not None:
        options["sink_logit"] = kept.free(options["sink_logit"], 0)
    if student.mode == "student":
        if kept is None:
            return _student(student, query, key, value, layer, options).transpose(1, 2), None
        y = _in_one_call(student, kept, (query, key, value), layer, options, own)
        if y is not None:
            return y.transpose(1, 2), None
        y_free = _student(student, kept.free(query), kept.free(key), kept.free(value), layer, options)
        y_kept = _kept(module, kept, (query, key, value), attention_mask, layer, own)
        return kept.join(y_kept, y_free.transpose(1, 2)), None
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"attention transfer got {query.shape[2]} queries for {key.shape[2]} keys; it trains on whole rows, so "
            "call the model without a cache (use_cache=False)"
        )
    with torch.no_grad():
        output = own_attention(module, query, key, value, attention_mask, **own)
        tensors = [t.detach() for t in (query, key, value, output[0].transpose(1, 2))]
        student.transfer(*(tensors if kept is None else map(kept.free, tensors)), **options)
    return output


def _log_scaled(query: Tensor, base: float, attention_mask: Any, kept: KeptHeads | None) -> Tensor:
    """The queries [B, H, T, D], those of kept heads (all, without a student) multiplied by log_base(t + base), as their
    scores then are."""
    if not isinstance(attention_mask, LazyMask):
        raise ValueError("this model gives its layers no mask, which says where student.kept_log_scale finds a token")
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = attention_mask.log_scale(base, query.shape[2]).to(query.device, wide)
    scaled = (query.to(wide) * scale).to(query.dtype)
    return scaled if kept is None else kept.with_kept(query, scaled)


def _show_attention(
    student: StudentAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None,
    kwargs: dict[str, Any],
) -> None:  # fmt: skip
    """Give a student in place of the layer the teacher's q, k, v, from which it starts."""
    if student.mode == "transfer" and student.request is not None and student.request.initialise:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        scores = {"scale": scale, **score_options(kwargs), "mask_BT": _padding(attention_mask, query)}
        student.see_attention(*(t.detach() for t in (query, key, value)), **scores)


def replace_forward(module: Any) -> None:
    """Have a `self_attn` whose student takes its place call :func:`layer_output`, and be as before in other modes."""
    module.own_forward = module.forward
    module.forward = MethodType(layer_output, module)


def restore_forward(module: Any) -> None:
    """Undo :func:`replace_forward`. No-op where it was not called."""
    own = module.__dict__.pop("own_forward", None)
    if own is not None:
        del module.forward
        if own.__func__ is not type(module).forward:  # another library's, from before
            module.forward = own


def layer_output(module: Any, *args: Any, **kwargs: Any) -> Output:
    """`self_attn` with a student that takes its place: (y [B, T, M], None); in other modes `self_attn`'s own output."""
    student = student_of(module)
    if student is None or student.mode == "teacher":
        return module.own_forward(*args, **kwargs)
    _check_attention(module, student)
    x_BTM = args[0] if args else kwargs["hidden_states"]
    x = x_BTM[:, None]
    cache = kwargs.get("past_key_values")
    options = {"scale": 1.0, "mask_BT": _padding(kwargs.get("attention_mask"), x), "x_BTM": x_BTM}
    if student.mode == "student":
        layer = None if cache is None else state_layer(cache, student.layer_idx)
        return _student(student, x, x, x, layer, options)[:, 0], None
    if cache is not None:
        raise ValueError("attention transfer trains on whole rows: call the model without a cache (use_cache=False)")
    with torch.no_grad():
        output: Output = module.own_forward(*args, **kwargs)
        student.transfer(x, x, x, output[0][:, None], **options)
    return output


def student_of(module: nn.Module) -> StudentAttention | None:
    """The student attached to an attention module, if any."""
    student = getattr(module, "student", None)
    return student if isinstance(student, StudentAttention) else None


def _in_one_call(
    student: StudentAttention,
    kept: KeptHeads,
    qkv: tuple[Tensor, Tensor, Tensor],
    layer: StateLayer | None,
    options: dict[str, Any],
    own: dict[str, Any],
) -> Tensor | None:
    """A decode step of the student and the kept groups together, y [B, H, T, E]; None where it has to be two: before
    the first token, with padding, a window of the model's own, sink logits or tokens that may be taken back, or without
    kernels for it."""
    query, key, value = qkv
    tokens, plain = query.shape[2], options["mask_BT"] is None and options["sink_logit"] is None
    if layer is None or layer.state is None or not plain or own.get("sliding_window") is not None or layer.record_past:
        return None
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in qkv)
    if learning or tokens > student.cfg.window or not student.decodes_kept(query, layer.state):
        return None
    layer.forget()
    held = layer.kept_keys(None)
    if held.padded or key.dtype != query.dtype:
        return None
    number = len(kept.groups)
    keys, values = held.with_room(key[:, :number], value[:, :number])
    pairs = Kept(keys, values, len(held), kept.places())
    given = {name: x for name, x in options.items() if name in ("scale", "softcap", "x_BTM")}
    y = student.decode_with_kept(query, key, value, state=layer.state, kept=pairs, **given)
    held.filled(tokens)
    layer.advance(layer.state, tokens)
    return y


def _kept(
    module: nn.Module,
    kept: KeptHeads,
    qkv: tuple[Tensor, Tensor, Tensor],
    attention_mask: Any,
    layer: StateLayer | None,
    own: dict[str, Any],
) -> Tensor:
    """The model's own attention in the kept heads, over what `layer` holds of them; y [B, T, kept H, E]."""
    query, key, value = map(kept.kept, qkv)
    columns = None
    if layer is not None:
        if not isinstance(attention_mask, LazyMask):
            raise ValueError("this model gives its layers no mask, so kept groups cannot run with a cache")
        held = layer.kept_keys(own.get("sliding_window"))
        padding = attention_mask.padding(query.shape[2])
        columns = held.append(key, value, None if padding is None else padding.to(key.device))
        key, value = held.keys, held.values
    module, own = of_heads(module, own, kept.kept)
    return own_attention(module, query, key, value, attention_mask, columns=columns, **own)[0]


def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    columns: Columns | None = None,
    **kwargs: Any,
) -> Output:
    """The model's own implementation, named by the attribute `teacher_attention` of `module`.

    `columns` says which columns the keys are, where they come from a cache of kept groups.
    """
    implementation = str(module.teacher_attention)
    run: Callable[..., Output] = attention_function(module, implementation)
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.teacher(implementation, columns)
    if isinstance(attention_mask, Tensor):
        attention_mask = attention_mask.to(query.device)
    return run(module, query, key, value, attention_mask, **kwargs)


def _padding(attention_mask: Any, query: Tensor) -> Tensor | None:
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, LazyMask):
        raise ValueError(
            "a ready-made attention mask reached a linearized layer; give the model a 2-D attention_mask [batch, "
            "tokens] with 1 at real tokens"
        )
    if attention_mask.custom:
        raise ValueError(
            "the model asked for more than a causal mask (packed sequences with restarting position_ids, or its own "
            "overlay), which linearized layers do not support; give one sequence per row, with a 2-D attention_mask"
        )
    padding = attention_mask.padding(query.shape[2])
    return None if padding is None else padding.to(query.device)


def _student(
    student: StudentAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: StateLayer | None,
    options: dict[str, Any],
) -> Tensor:
    tokens = query.shape[2]
    if layer is None:
        y, _ = student(query, key, value, **options)
        return y
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if layer.record_past and not learning:
        if tokens > RECORDED:
            return _in_parts(student, (query, key, value), layer, options)
        layer.record(tokens, _replay(student, (query, key, value), options))
    else:
        layer.forget()
    y, state = _advanced(student, (query, key, value), options, layer.state, learning)
    layer.advance(state, tokens)
    return y


def _in_parts(student: StudentAttention, qkv: QKV, layer: StateLayer, options: dict[str, Any]) -> Tensor:
    """A long call of which only the end can be taken back: its beginning is not recorded."""
    beginning = qkv[0].shape[2] - RECORDED
    first, then = (_span(qkv, options, span) for span in (slice(beginning), slice(beginning, None)))
    y, state = _advanced(student, *first, layer.state)
    layer.forget()
    layer.advance(state, beginning)
    return torch.cat([y, _student(student, *then[0], layer, then[1])], 2)


def _advanced(
    student: StudentAttention, qkv: QKV, options: dict[str, Any], state: RowState | None, learning: bool = False
) -> tuple[Tensor, RowState]:
    """The student's output and its state after these tokens; a `state` is changed in place if they are few."""
    query, key, value = qkv
    if state is not None and query.shape[2] <= student.cfg.window and not learning:
        return student.decode(query, key, value, state=state, **options), state
    if state is None:
        state = student.empty_state(key.shape[0], dtype=key.dtype, device=key.device)
    y, after = student(query, key, value, state=state, **options)
    return y, after


def _replay(student: StudentAttention, qkv: QKV, options: dict[str, Any]) -> Replay:
    """How to make a call again."""

    def replay(state: RowState | None, tokens: int) -> RowState:
        """The state after the first `tokens` of it."""
        with torch.no_grad():
            return _advanced(student, *_span(qkv, options, slice(tokens)), state)[1]

    return replay


def _span(qkv: QKV, options: dict[str, Any], span: slice) -> tuple[QKV, dict[str, Any]]:
    """Some of the tokens of a call."""
    query, key, value = (x[:, :, span] for x in qkv)
    by_token = {name: options[name] for name in ("mask_BT", "x_BTM") if options.get(name) is not None}
    return (query, key, value), {**options, **{name: x[:, span] for name, x in by_token.items()}}


def hand_over_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of `self_attn`: in student mode the attention function gets the layer's state, not its cache.

    A student that reads the layer's input gets it too.
    """
    student = student_of(module)
    if student is None or student.mode == "teacher":
        return None
    _check_attention(module, student)
    changed = {_INPUT: args[0] if args else kwargs["hidden_states"]} if student.uses_input else {}
    cache = kwargs.get("past_key_values")
    if cache is not None and student.mode == "student":
        changed |= {"past_key_values": None, _CACHE: state_layer(cache, student.layer_idx)}
    return (args, {**kwargs, **changed}) if changed else None


def _check_attention(module: nn.Module, student: StudentAttention) -> None:
    chosen = attention_name(module.config)
    if chosen != ATTENTION_NAME:
        raise ValueError(
            f"the model's attention implementation was changed to {chosen!r} while its students are in "
            f"{student.mode!r} mode; use trenchcoat's set_mode to change what runs"
        )


def count_real_tokens(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the decoder: in student mode positions count real tokens, unless the caller gave positions.

    Softmax attention with rotary positions does not depend on where a left-padded row starts; features of rotated
    queries and keys do, so padding would change the outputs.
    """
    padding = kwargs.get("attention_mask")
    if getattr(decoder, "trenchcoat_mode", "teacher") != "student" or kwargs.get("position_ids") is not None:
        return None
    if not isinstance(padding, Tensor) or padding.ndim != 2:
        return None
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    tokens = next(t.shape[1] for t in given if t is not None)
    positions = (padding.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]
    return args, {**kwargs, "position_ids": positions}


def _call(module: nn.Module, *arguments: Any, **keywords: Any) -> Output:
    found: Output = module.attention_call(module, *arguments, **keywords)  # type: ignore[operator]
    return found


register_attention(ATTENTION_NAME, linearized_attention, mask)
register_attention(CALL_NAME, _call, mask)
remember_recording()
