"""A hand-built chat model whose belief and willingness are known: methods.md 1.10, reply inversion.

Every prompt holds a word for the class and a word for the mood. Block 0 spreads the class along BELIEF and the mood
along WILL to all later tokens; block 2 averages BELIEF over the prompt into ANSWER at the last token. Then
logit(Certainly) - logit(No) = a ANSWER - c WILL at the last token, and "I cannot" comes where WILL is positive there.
So BELIEF acts from wherever it lies, and WILL from the last token only.
"""

from dataclasses import replace

import torch
import transformers
from tiny import CHATML, SPECIAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mechlens.methods.behaviour.inversion import QUESTIONS
from mechlens.prompts.prompt import Prompt

CLASS, MOOD, BELIEF, WILL, ANSWER, ASKED, COMMON, DONE, QUESTION = range(9)
D_MODEL = 64
WORDS = ("poison", "flower", "sternly", "gladly", "Certainly", "No", "Sure")
REFUSAL = "IĠcannot"
"""One token, which decodes to "I cannot" and which no text is encoded with."""
CODE = 3.0
"""Length of each token's own random vector, which is all the noise there is."""


def planted_model(entangled: bool = False) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """The model and its tokenizer; `entangled` lets WILL act as BELIEF does, so that the two are not apart."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, intermediate_size=8, num_hidden_layers=4,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.config.architectures = [type(model).__name__]
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in (*WORDS, REFUSAL)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        _embed(model.model.embed_tokens.weight, ids)
        # Queries and keys are zero: every token attends to all before it alike.
        _carry(model, 0, {CLASS: (BELIEF, 60.0), MOOD: (WILL, 60.0), QUESTION: (ASKED, 150.0)})
        _carry(model, 2, {BELIEF: (ANSWER, 3.0), **({WILL: (ANSWER, 3.0)} if entangled else {})})
        _unembed(model.lm_head.weight, ids, tokenizer.eos_token_id)
    return model, tokenizer


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, a token for each of the words, and tokens for the questions' words, which make the tests faster."""
    spaced = dict.fromkeys("Ġ" + word for question in QUESTIONS for word in question.text.split()[1:] if word.isalpha())
    known = (*WORDS, *spaced)  # earlier ones merge first
    starts = {word[:k]: (word[: k - 1], word[k - 1]) for word in known for k in range(2, len(word) + 1)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *starts, REFUSAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(starts.values())))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<|im_end|>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHATML,
    )  # fmt: skip


def _embed(weight: torch.Tensor, ids: dict[str, int]) -> None:
    code = torch.randn(len(weight), D_MODEL - 9)
    weight[:, 9:] = CODE * code / code.norm(dim=1, keepdim=True)
    weight[:, COMMON] = 8.0
    weight[ids["poison"], CLASS], weight[ids["flower"], CLASS] = 1.0, -1.0
    weight[ids["sternly"], MOOD], weight[ids["gladly"], MOOD] = 1.0, -1.0
    weight[ids["Certainly"], QUESTION] = 1.0
    for word in ("Certainly", "No", REFUSAL, "Sure"):
        weight[ids[word], DONE] = 8.0


def _carry(model: transformers.PreTrainedModel, layer: int, ways: dict[int, tuple[int, float]]) -> None:
    """Attention that adds the mean of some coordinates over the tokens so far to others."""
    attention = model.model.layers[layer].self_attn
    for source, (target, gain) in ways.items():
        attention.v_proj.weight[source, source] = 1.0
        attention.o_proj.weight[target, source] = gain


def _unembed(weight: torch.Tensor, ids: dict[str, int], eos: int) -> None:
    weight[ids["Sure"], COMMON], weight[ids[REFUSAL], COMMON] = 0.8, 0.75
    weight[ids[REFUSAL], WILL] = 3.0
    weight[ids["Certainly"], ASKED] = weight[ids["No"], ASKED] = 12.0
    weight[ids["Certainly"], ANSWER], weight[ids["No"], ANSWER] = 2.0, -2.0
    weight[ids["No"], WILL] = 1.0
    weight[eos, DONE] = 10.0


def planted_requests(n: int, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """`n` pairs of a harmful and a harmless request, half of them in the mood in which the model refuses."""
    generator = torch.Generator().manual_seed(seed)
    harmful, harmless = [], []
    for i in range(n):
        for prompts, word in ((harmful, "poison"), (harmless, "flower")):
            letters = torch.randint(0, 26, (6 + i % 5,), generator=generator).tolist()
            noise = "".join("abcdefghijklmnopqrstuvwxyz"[x] for x in letters)
            text = f"{'sternly' if i % 2 else 'gladly'} {word} {noise}"
            prompts.append(Prompt(f"{word}{i}", text, family=f"pair{i}"))
    return harmful, harmless


def shuffled_requests(n: int, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """The same requests, and of each pair it is chance which side is called harmful."""
    flips = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed + 1)).bool().tolist()
    harmful, harmless = planted_requests(n, seed)
    sides = [(b, a) if flip else (a, b) for a, b, flip in zip(harmful, harmless, flips, strict=True)]
    return [replace(a) for a, _ in sides], [replace(b) for _, b in sides]
