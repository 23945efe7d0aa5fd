"""Number types shared by several schemas, with wide ranges, and checks across fields.

The ranges reject values that no model uses (an epsilon of 0, a base of 1e300), not values that are
merely unusual. Sizes are bounded by the bytes of the weights, in `readers.weights.check_room`.
"""

from typing import Annotated

from pydantic import BeforeValidator, Field, JsonValue


def as_list(value: JsonValue) -> list[JsonValue]:
    """Return None, a single value or a list as a list.

    Args:
      value: a JSON value.
    """
    return value if isinstance(value, list) else [] if value is None else [value]


MOST = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=1, le=MOST)]
TokenId = Annotated[int, Field(ge=0, lt=2**24)]
Ids = Annotated[list[TokenId], BeforeValidator(as_list)]
Factor = Annotated[float, Field(gt=0, le=1e9)]
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
Theta = Annotated[float, Field(ge=1, le=1e15)]
Switch = Annotated[bool, BeforeValidator(lambda v: False if v is None else v)]


def check_heads(names: tuple[str, str, str], heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless the heads suit RoPE (even head_dim) and grouped-query attention.

    Args:
      names: names of the three fields, for the message.
      heads: number of query heads.
      kv_heads: number of key-value heads, a divisor of heads.
      head_dim: channels per head, an even number.
    """
    if heads % kv_heads:
        raise ValueError(f"{names[0]} must be a multiple of {names[1]}, got {heads} and {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"{names[2]} must be even (RoPE turns pairs), got {head_dim}")


def check_experts(names: tuple[str, str, str], experts: int, chosen: int, width: int) -> None:
    """Raise ValueError unless the sizes of experts are all given, or all 0.

    Args:
      names: names of the three fields, for the message.
      experts: number of experts of a layer.
      chosen: number of experts that a token is sent to, at most `experts`.
      width: hidden width of an expert.
    """
    if any((experts, chosen, width)) and not (1 <= chosen <= experts and width):
        raise ValueError(
            f"{', '.join(names)} must all be 0, for a model without experts, or at least 1, the "
            f"second at most the first, got {experts}, {chosen}, {width}"
        )


def check_window(window: int | None, max_position: int) -> None:
    """Raise ValueError if attention has a window smaller than the number of positions.

    Args:
      window: width of the attention window, or None for full attention.
      max_position: maximum number of positions.
    """
    if window and window < max_position:
        raise ValueError(
            f"sliding-window attention is not supported (window {window} < {max_position} "
            f"positions); lower max_position_embeddings to {window} to use full attention"
        )


def check_ids(rows: int, **named: list[int]) -> None:
    """Raise ValueError for a token id that has no row in the embedding.

    Args:
      rows: number of rows of the embedding.
      **named: field name -> its token ids.
    """
    for name, ids in named.items():
        if ids and max(ids) >= rows:
            raise ValueError(f"{name} must be below the vocabulary's {rows}, got {max(ids)}")
