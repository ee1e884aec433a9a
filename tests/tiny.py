"""Random tiny chat models of many architectures, with an in-memory tokenizer: exact tests without a download."""

import string
from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(template: str | None = CHATML, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows a few merges, with special tokens and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g")]
    tokens = alphabet + [a + b for a, b in merges]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *extra, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *extra],
        chat_template=template,
    )


VOCAB = 5 + 256 + 6 + 3
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 4,
}
NO_GROUPS = {**SMALL, "num_key_value_heads": 4}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=8, **SMALL),
    "gemma2": lambda: transformers.Gemma2Config(head_dim=8, sliding_window=16, **SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(head_dim=8, sliding_window=16, **SMALL),
    "mistral": lambda: transformers.MistralConfig(sliding_window=16, **SMALL),
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=4, **SMALL),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "phi": lambda: transformers.PhiConfig(**NO_GROUPS),
    "stablelm": lambda: transformers.StableLmConfig(**SMALL),
    "neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: transformers.GPT2Config(**GPT),
    "gptj": lambda: transformers.GPTJConfig(rotary_dim=4, **GPT),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=512,
    ),
}  # fmt: skip
ARCHITECTURES = tuple(CONFIGS)

LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STATES = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3, "eos_token_id": 4}
HEAD = {**SMALL, "head_dim": 8}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16,
}  # fmt: skip
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 8}
FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": 4}
MORE: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    # Logits and residuals are scaled.
    "granite": lambda: transformers.GraniteConfig(
        logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, **SMALL
    ),
    "cohere": lambda: transformers.CohereConfig(logit_scale=0.0625, **SMALL),
    "cohere2": lambda: transformers.Cohere2Config(
        logit_scale=0.0625, layer_types=["sliding_attention", "sliding_attention", "full_attention"], **HEAD
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        num_local_experts=4, num_experts_per_tok=2, logits_scaling=8.0, **SMALL
    ),
    # Some or all blocks keep a state instead of keys and values.
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        layer_types=["linear_attention", "linear_attention", "full_attention"], **LINEAR, **HEAD
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        layer_types=["linear_attention", "full_attention", "linear_attention"], shared_expert_intermediate_size=16,
        **EXPERTS, **LINEAR, **HEAD,
    ),
    "qwen3_next_linear": lambda: transformers.Qwen3NextConfig(
        layer_types=["linear_attention"] * 3, shared_expert_intermediate_size=16, **EXPERTS, **LINEAR, **HEAD
    ),
    "lfm2": lambda: transformers.Lfm2Config(layer_types=["conv", "conv", "full_attention"], **SMALL),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        num_dense_layers=1, layer_types=["conv", "conv", "full_attention"], **EXPERTS, **SMALL
    ),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(**SMALL),
    "jamba": lambda: transformers.JambaConfig(
        num_experts=4, mamba_d_state=8, mamba_dt_rank=4, attn_layer_period=3,
        attn_layer_offset=1, expert_layer_period=2, **SMALL,
    ),
    "bamba": lambda: transformers.BambaConfig(mamba_n_groups=1, attn_layer_indices=[1], **MAMBA, **SMALL),
    "falcon_h1": lambda: transformers.FalconH1Config(
        mamba_d_ssm=32, mamba_n_groups=1, lm_head_multiplier=0.25, embedding_multiplier=3.0,
        **{**MAMBA, "mamba_n_heads": 4}, **HEAD,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, hybrid_override_pattern="M*-", **HEAD
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        num_local_experts=4, num_experts_per_tok=2, mamba_expand=2, shared_intermediate_size=32,
        layer_types=["mamba", "mamba", "attention"], **MAMBA, **SMALL,
    ),
    "mamba": lambda: transformers.MambaConfig(**STATES),
    "mamba2": lambda: transformers.Mamba2Config(num_heads=8, head_dim=8, n_groups=2, **STATES),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**STATES),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        lru_width=32, attention_window_size=16, **{k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
    ),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32, rescale_every=2, eos_token_id=4
    ),
    # Others that TransformerLens knows.
    "gemma": lambda: transformers.GemmaConfig(**HEAD),
    "gemma4": lambda: transformers.Gemma4TextConfig(sliding_window=16, **HEAD),
    "llama4": lambda: transformers.Llama4TextConfig(num_local_experts=4, intermediate_size_mlp=64, **HEAD),
    "smollm3": lambda: transformers.SmolLM3Config(**SMALL),
    "olmo": lambda: transformers.OlmoConfig(**SMALL),
    "olmo3": lambda: transformers.Olmo3Config(sliding_window=16, **SMALL),
    "olmoe": lambda: transformers.OlmoeConfig(num_experts=4, num_experts_per_tok=2, **SMALL),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(shared_expert_intermediate_size=16, **EXPERTS, **SMALL),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**EXPERTS, **HEAD),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        first_k_dense_replace=1, **LATENT, **NO_GROUPS
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        num_local_experts=4, num_experts_per_tok=2, sliding_window=16, **HEAD
    ),
    "falcon": lambda: transformers.FalconConfig(alibi=False, new_decoder_architecture=False, **FALCON),
    "mpt": lambda: transformers.MptConfig(
        vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, expansion_ratio=2, max_seq_len=512
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=3, num_heads=4, window_size=16, max_position_embeddings=512,
        attention_types=[[["global", "local", "global"], 1]], eos_token_id=4,
    ),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**GPT),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=VOCAB, d_model=32, ffn_dim=64, num_layers=3, attention_heads=4, eos_token_id=4
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**SMALL),
    "nemotron": lambda: transformers.NemotronConfig(**SMALL),
    "glm4": lambda: transformers.Glm4Config(**HEAD),
    "exaone4": lambda: transformers.Exaone4Config(sliding_window=16, **SMALL),
    "ernie4_5": lambda: transformers.Ernie4_5Config(**SMALL),
    "hunyuan": lambda: transformers.HunYuanDenseV1Config(**HEAD),
    "seed_oss": lambda: transformers.SeedOssConfig(**HEAD),
    "apertus": lambda: transformers.ApertusConfig(**SMALL),
    "arcee": lambda: transformers.ArceeConfig(**SMALL),
    "bitnet": lambda: transformers.BitNetConfig(**SMALL),
    "afmoe": lambda: transformers.AfmoeConfig(sliding_window=16, num_shared_experts=1, **EXPERTS, **HEAD),
    "bert": lambda: transformers.BertConfig(is_decoder=True, **NO_GROUPS),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(first_k_dense_replace=1, **LATENT, **NO_GROUPS),
    "deepseek_v4": lambda: transformers.DeepseekV4Config(
        num_key_value_heads=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, q_lora_rank=16,
        o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=8, index_topk=8, sliding_window=16,
        **{k: v for k, v in HEAD.items() if k not in ("num_key_value_heads", "intermediate_size")},
    ),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        moe_intermediate_size=16, moe_k=2, moe_num_experts=4, moe_num_shared_experts=1, **SMALL
    ),
    "flex_olmo": lambda: transformers.FlexOlmoConfig(num_experts=4, num_experts_per_tok=2, **SMALL),
    "gemma3_multimodal": lambda: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(sliding_window=16, **HEAD), vision_config={**EYES, "image_size": 32},
        mm_tokens_per_image=4,
    ),
    "gemma3n": lambda: transformers.Gemma3nConfig(
        text_config={"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
                     "sliding_window": 16, "laurel_rank": 8, **HEAD},
    ),
    "gemma4_multimodal": lambda: transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(sliding_window=16, vocab_size_per_layer_input=VOCAB, **HEAD),
        vision_config={**EYES, "head_dim": 8, "num_key_value_heads": 4}, audio_config=None,
    ),
    "gemma4_unified": lambda: transformers.Gemma4UnifiedConfig(
        text_config=transformers.Gemma4UnifiedTextConfig(sliding_window=16, **HEAD),
        vision_config={"mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 16}, audio_config=None,
    ),
    "glm": lambda: transformers.GlmConfig(**HEAD),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, **SMALL
    ),
    "glm4_moe_lite": lambda: transformers.Glm4MoeLiteConfig(**LATENT, **NO_GROUPS),
    "glm_moe_dsa": lambda: transformers.GlmMoeDsaConfig(index_topk=8, **LATENT, **NO_GROUPS),
    "hrm_text": lambda: transformers.HrmTextConfig(
        prefix_lm=False, **{k: v for k, v in HEAD.items() if k != "num_key_value_heads"}
    ),
    "jais2": lambda: transformers.Jais2Config(**SMALL),
    "jetmoe": lambda: transformers.JetMoeConfig(
        kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
        **{k: v for k, v in SMALL.items() if k != "num_attention_heads"},
    ),
    "laguna": lambda: transformers.LagunaConfig(
        sliding_window=16, shared_expert_intermediate_size=16, **EXPERTS, **HEAD
    ),
    "minimax_m2": lambda: transformers.MiniMaxM2Config(num_local_experts=4, num_experts_per_tok=2, **HEAD),
    "ministral3": lambda: transformers.Ministral3Config(**HEAD),
    "modernbert_decoder": lambda: transformers.ModernBertDecoderConfig(
        local_attention=16, **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    ),
    "nanochat": lambda: transformers.NanoChatConfig(**NO_GROUPS),
    "openai": lambda: transformers.OpenAIGPTConfig(**GPT),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(
        layer_types=["linear_attention", "linear_attention", "full_attention"], shared_expert_intermediate_size=16,
        **EXPERTS, **LINEAR, **HEAD,
    ),
    "vaultgemma": lambda: transformers.VaultGemmaConfig(sliding_window=16, **HEAD),
    "youtu": lambda: transformers.YoutuConfig(
        **{k: v for k, v in LATENT.items() if k.startswith(("kv", "q", "v"))}, **NO_GROUPS
    ),
    "zamba2": lambda: transformers.Zamba2Config(
        layers_block_type=["mamba", "hybrid", "mamba"], n_mamba_heads=8, mamba_d_state=8, mamba_headdim=8,
        adapter_rank=8, use_mamba_kernels=False, **NO_GROUPS,
    ),
    # Those that TransformerLens can't wrap.
    "codegen": lambda: transformers.CodeGenConfig(rotary_dim=4, **GPT),
    "helium": lambda: transformers.HeliumConfig(**HEAD),
    "ministral": lambda: transformers.MinistralConfig(sliding_window=16, **HEAD),
    "phimoe": lambda: transformers.PhimoeConfig(num_local_experts=4, **SMALL),
    "minimax": lambda: transformers.MiniMaxConfig(
        num_local_experts=4, layer_types=["linear_attention", "full_attention", "linear_attention"], block_size=8,
        **HEAD,
    ),
}  # fmt: skip
"""More architectures, for the table of what each can do and for what is special about some."""


def tiny_hf(architecture: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random three-layer model in eval mode; weights are scaled up so that layers really differ."""
    torch.manual_seed(seed)
    config = (CONFIGS | MORE)[architecture]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.config.architectures = [type(model).__name__]
    return model.eval().to(dtype)


def words(n: int, seed: int = 0) -> list[str]:
    """Pronounceable nonsense requests of different lengths, all distinct."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(n):
        length = int(torch.randint(3, 40, (1,), generator=generator))
        letters = torch.randint(0, 26, (length,), generator=generator).tolist()
        texts.append(f"{i} the " + "".join(string.ascii_lowercase[x] for x in letters) + ("?" if i % 2 else "."))
    return texts
