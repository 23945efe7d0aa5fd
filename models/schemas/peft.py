"""Schema of the adapter_config.json of a PEFT folder that holds a LoRA adapter."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from jaxquant.core.fields import shown
from jaxquant_models.schemas.fields import Factor, Size, Switch
from jaxquant_models.schemas.strict import Schema

# Options under which PEFT computes something else than one rank and one scaling everywhere.
UNSUPPORTED = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip


class PeftConfig(Schema):
    """adapter_config.json; what it leaves out has PEFT's defaults."""

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    r: Size = 8
    lora_alpha: Factor = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | str | None = None
    bias: Literal["none"] = "none"
    fan_in_fan_out: Switch = False
    use_rslora: Switch = False
    use_dora: Switch = False
    rank_pattern: Any = None
    alpha_pattern: Any = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: JsonValue) -> JsonValue:
        if isinstance(data, dict):
            for name in UNSUPPORTED:
                if data.get(name):
                    raise ValueError(
                        f"{name} is not supported: expected it empty or left out, got "
                        f"{shown(data[name])}; train or save the adapter without it"
                    )
        return data

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.fan_in_fan_out:
            raise ValueError("fan_in_fan_out must be false: the models here have no such layers")
        return self

    @property
    def named(self) -> list[str]:
        """The names in `target_modules`; none if it is a pattern, such as "all-linear"."""
        return self.target_modules if isinstance(self.target_modules, list) else []
