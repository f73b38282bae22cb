"""Every hyper-parameter of the model, one line each, and the published sizes by name."""

from typing import Any

from transformers import PretrainedConfig

IGNORED_LABEL = -100  # of a token whose prediction is not trained, as in transformers

PRESETS: dict[str, dict[str, Any]] = {
    "minimind-small-T": dict(dim=512, n_layers=8, vocab_size=6400),  # 26,878,464 parameters
    "minimind-small": dict(dim=640, n_layers=8, vocab_size=32000),  # 56,863,360
    "minimind": dict(dim=1024, n_layers=16, vocab_size=32000),  # 218,399,744
    "minimind-moe": dict(dim=640, n_layers=8, vocab_size=32000, use_moe=True),  # 163,052,160
    "minimind-v1": dict(dim=768, n_layers=16, vocab_size=6400),  # 108,749,568
    "tiny": dict(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=6400),  # 6,065,408: for a CPU
}


class LMConfig(PretrainedConfig):
    """Configuration of `Transformer`; the defaults are those of the preset minimind-small-T.

    Raises:
        ValueError: sizes below 1, heads that do not divide the width, or more experts a token than there are.
    """

    model_type = "minimind"
    # The names under which transformers' own code (generation, caches) looks for the same numbers.
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "hidden_dim",
        "max_position_embeddings": "max_seq_len",
    }

    dim: int = 512  # width of the residual stream
    n_layers: int = 8  # blocks of attention + feed-forward
    n_heads: int = 16  # query heads, each dim / n_heads wide
    n_kv_heads: int = 8  # key/value heads, each shared by n_heads / n_kv_heads query heads
    vocab_size: int = 6400  # tokens
    hidden_dim: int | None = None  # width of the feed-forward layer; None means 8/3 dim ...
    multiple_of: int = 64  # ... rounded up to a multiple of this
    norm_eps: float = 1e-5  # keeps RMSNorm from dividing by zero
    max_seq_len: int = 512  # context in tokens that the model is trained on
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: float | dict | None = None  # linear interpolation: positions are divided by this factor
    dropout: float = 0.0  # probability of dropping an activation, in training only
    flash_attn: bool = True  # PyTorch's fused attention; False: the same, written out
    use_moe: bool = False  # mixture of experts in place of the one feed-forward layer
    num_experts_per_tok: int = 2  # routed experts that each token visits (top-k)
    n_routed_experts: int = 4  # routed experts to choose from
    n_shared_experts: int | bool = 1  # experts that every token visits
    scoring_func: str = "softmax"  # how router logits become weights; the only one there is
    aux_loss_alpha: float = 0.01  # weight of each layer's balance loss
    seq_aux: bool = True  # experts are balanced within each sequence; False: within the micro-batch
    norm_topk_prob: bool = True  # the weights of a token's chosen experts sum to 1
    initializer_range: float = 0.02  # standard deviation of a fresh embedding
    pad_token_id: int | None = 0  # <unk>
    bos_token_id: int | None = 1  # <s>
    eos_token_id: int | None = 2  # </s>
    tie_word_embeddings: bool = True  # the output head is the embedding

    def __post_init__(self, **kwargs: Any):
        if self.hidden_dim is None:
            self.hidden_dim = feed_forward_width(self.dim, self.multiple_of)
        self.n_shared_experts = int(self.n_shared_experts or 0)
        if isinstance(self.rope_scaling, float | int):  # as a dict: transformers' own code expects one in config.json
            self.rope_scaling = {"rope_type": "linear", "factor": float(self.rope_scaling)}
        super().__post_init__(**kwargs)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must lie between 0 and 1")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"dim {self.dim} must be a multiple of twice n_heads {self.n_heads}, "
                f"and n_heads a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(f"num_experts_per_tok must lie between 1 and n_routed_experts {self.n_routed_experts}")
        if self.rope_scaling and (self.rope_scaling.get("rope_type") != "linear" or not self.rope_factor > 0):
            raise ValueError(f"rope_scaling {self.rope_scaling} must be linear, with a factor above 0")
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func {self.scoring_func!r} is unknown; there is only softmax")

    @property
    def rope_factor(self) -> float:
        """What positions are divided by."""
        return self.rope_scaling["factor"] if self.rope_scaling else 1.0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LMConfig":
        """A published size by name; raises ValueError for an unknown one."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))


def feed_forward_width(dim: int, multiple_of: int) -> int:
    """8/3 dim, so that SwiGLU's three matrices cost what a plain feed-forward's two of 4 dim do (Shazeer 2020)."""
    return -(-int(2 / 3 * 4 * dim) // multiple_of) * multiple_of
