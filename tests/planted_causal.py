"""Hand-built chat models whose belief and willingness are known: methods.md 1.10, reply inversion.

Every prompt holds a word for the class and a word for the mood. Block 0 spreads the class along BELIEF and the mood
along WILL to all later tokens; block 1 notes whether the question is reversed, by a word that only those hold; block 2
averages BELIEF over the prompt into ANSWER at the last token, which block 3 turns round for a reversed question. Then
logit(Certainly) - logit(No) = +-a ANSWER - c WILL at the last token, and "I cannot" comes where WILL is positive there.
So BELIEF acts from wherever it lies, and WILL from the last token only.
"""

from dataclasses import replace
from typing import Literal

import torch
import transformers
from tiny import CHATML, SPECIAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mechlens.methods.behaviour.inversion import QUESTIONS
from mechlens.prompts.prompt import Prompt

CLASS, MOOD, BELIEF, WILL, ANSWER, ASKED, COMMON, DONE, QUESTION, MARK, REVERSED, SAYS_YES = range(12)
D_MODEL = 64
WORDS = ("poison", "flower", "sternly", "gladly", "Certainly", "No", "Sure")
MARKS = ("Ġharmless", "Ġfree", "Ġinnocent", "Ġsafe")
"""Words of which every reversed question holds one, and no other text any."""
REFUSAL = "IĠcannot"
"""One token, which decodes to "I cannot" and which no text is encoded with."""
CODE = 3.0
"""Length of each token's own random vector, which is all the noise there is."""
TURN = -0.4
"""So that a reversed question turns ANSWER round where a push has made the residual stream longer too."""
SLOW = 31
"""A dimension of the only head that rotary positions hardly turn."""

World = Literal["apart", "one variable", "reversing", "says yes"]
"""apart: as above. one variable: WILL acts as BELIEF does too. reversing: WILL acts on belief the other way, so that it
turns replies round just where it is added to harmful prompts and subtracted from harmless ones. says yes: what spreads
from the class makes the model say yes to everything, and belief comes from the class's own word."""


def planted_model(
    world: World = "apart",
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """The model of a world, and its tokenizer."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D_MODEL, intermediate_size=8, num_hidden_layers=4,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.config.architectures = [type(model).__name__]
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in (*WORDS, *MARKS, REFUSAL)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        _embed(model.model.embed_tokens.weight, ids)
        # Queries and keys are zero: every token attends to all before it alike; in block 1 to the marks alone.
        _carry(model, 0, {CLASS: (BELIEF, 60.0), MOOD: (WILL, 60.0), QUESTION: (ASKED, 150.0)})
        _carry(model, 1, {MARK: (REVERSED, 0.5)})
        model.model.layers[1].self_attn.q_proj.weight[SLOW, COMMON] = 20.0
        model.model.layers[1].self_attn.k_proj.weight[SLOW, MARK] = 20.0
        by_will = {"one variable": {WILL: (ANSWER, 3.0)}, "reversing": {WILL: (ANSWER, -3.0)}}
        believes = {CLASS: (ANSWER, 200.0), BELIEF: (SAYS_YES, 3.0)} if world == "says yes" else {BELIEF: (ANSWER, 3.0)}
        _carry(model, 2, {**believes, **by_will.get(world, {})})
        _turn_round(model.model.layers[3].mlp)
        _unembed(model.lm_head.weight, ids, tokenizer.eos_token_id)
    return model, tokenizer


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, a token for each of the words, and tokens for the questions' words, which make the tests faster."""
    spaced = dict.fromkeys(
        "Ġ" + word
        for question in QUESTIONS
        for word in (question.text + question.reversed).split()[1:]
        if word.isalpha()
    )
    known = (*WORDS, *MARKS, *spaced)  # earlier ones merge first
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
    code = torch.randn(len(weight), D_MODEL - 12)
    weight[:, 12:] = CODE * code / code.norm(dim=1, keepdim=True)
    weight[:, COMMON] = 8.0
    weight[ids["poison"], CLASS], weight[ids["flower"], CLASS] = 1.0, -1.0
    weight[ids["sternly"], MOOD], weight[ids["gladly"], MOOD] = 1.0, -1.0
    weight[ids["Certainly"], QUESTION] = 1.0
    for word in MARKS:
        weight[ids[word], MARK] = 8.0
    for word in ("Certainly", "No", REFUSAL, "Sure"):
        weight[ids[word], DONE] = 8.0


def _carry(model: transformers.PreTrainedModel, layer: int, ways: dict[int, tuple[int, float]]) -> None:
    """Attention that adds the mean of some coordinates over the tokens so far to others."""
    attention = model.model.layers[layer].self_attn
    for source, (target, gain) in ways.items():
        attention.v_proj.weight[source, source] = 1.0
        attention.o_proj.weight[target, source] = gain


def _turn_round(mlp: torch.nn.Module) -> None:
    """ANSWER - k ANSWER, k above 1 where a reversed question has made REVERSED large, 0 where it is 0."""
    mlp.gate_proj.weight[0, REVERSED] = 10.0
    mlp.up_proj.weight[0, ANSWER] = 1.0
    mlp.down_proj.weight[ANSWER, 0] = TURN


def _unembed(weight: torch.Tensor, ids: dict[str, int], eos: int) -> None:
    weight[ids["Sure"], COMMON], weight[ids[REFUSAL], COMMON] = 0.8, 0.75
    weight[ids[REFUSAL], WILL] = 3.0
    weight[ids["Certainly"], ASKED] = weight[ids["No"], ASKED] = 12.0
    weight[ids["Certainly"], ANSWER], weight[ids["No"], ANSWER] = 2.0, -2.0
    weight[ids["Certainly"], SAYS_YES], weight[ids["No"], SAYS_YES] = 0.6, -0.6
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
