"""Makes the golden token ids with llama.cpp, a stranger to this project.

    python tests/text/make_golden_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf

needs `pip install llama-cpp-python gguf tiktoken regex` and writes the two JSON files beside this script. The second
one is about the cutting before the merges: a small vocabulary is learned from the texts without any cutting, so that
its merges reach across every boundary, and a cut in another place shows as other ids. For o200k ("gpt-4o") the truth
is tiktoken's pattern, from which llama.cpp departs at accented capitals and combining marks: its pieces, by length.
"""

import itertools
import json
import random
import sys
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import regex
import tiktoken_ext.openai_public

HERE = Path(__file__).parent
PRE = ("gpt-2", "smollm", "llama-bpe", "qwen2")
MERGES = 900

BY_HAND = [
    "",
    " ",
    "a",
    "Hello, world!",
    "hello  world   with    runs     of      spaces",
    " leading and trailing ",
    "   three before",
    "three after   ",
    "line one\nline two\n\nline four\n\n\n",
    "\n",
    "\n\n",
    " \n \n ",
    "\r\nwindows\r\nlines\r\n",
    "tabs\tand\t\ttabs\t",
    "\t",
    "\t\tindented\n\t\t\tmore",
    "def f(x):\n    if x:\n        return x ** 2\n    return None\n",
    "for (int i = 0; i < 10; ++i) { a[i] += 0x1F; }",
    "0 1 12 123 1234 12345 1234567890",
    "3.14159 1,000,000 -42 1e-10 50% $9.99 2024-02-29 12:34:56",
    "abc123def456",
    "٠١٢٣٤٥٦٧٨٩ १२३ ¼½¾ ²³ Ⅳ ①②",
    "I'm you're he's we've they'll I'd don't DON'T I'M 'tis rock'n'roll",
    "I\u2019m you\u2019re \u201cquoted\u201d \u2018single\u2019",
    "café naïve résumé Ångström façade Zürich señor",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "עברית בלי ניקוד וְעִם נִקּוּד",
    "اللغة العربية مع تَشْكِيل",
    "हिन्दी में लिखा हुआ पाठ",
    "ภาษาไทยไม่มีช่องว่าง",
    "日本語のテキスト、カタカナとひらがな。",
    "中文文本：没有空格，有标点！",
    "한국어 문장입니다.",
    "𠮷野家 𝒜𝓁𝓅𝒽𝒶 𝟘𝟙𝟚",
    "😀😃 👍🏽 👨‍👩‍👧‍👦 🇨🇭🇯🇵 ❤️ ☃",
    "mixed日本語and英語text混在123",
    "zero\u200bwidth\u200d and\ufeff bom and\u00a0nbsp\u3000wide\u2003em\u2028line\u2029par",
    "bell\x07 null? escape\x1b[31mred\x1b[0m del\x7f nel\x85",
    "\u0300\u0301 combining first",
    "!!!??? ... --- === *** ### @@@ ~~~ ``` ///",
    "https://example.org/path?query=1&b=%20#frag user@example.org",
    "C:\\Users\\name\\file.txt",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    '<div class="x">text &amp; more</div>',
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case HTTPServer XMLHttpRequest",
    "ALL CAPS TEXT AND Mixed CaSe",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>",
    "a<|im_end|>b",
    "  <|im_end|>  ",
    "<|endoftext|><|endoftext|>",
    "<|im_start|><|im_start",
    "<|im_<|im_end|>end|>",
    "<repo_name>a<file_sep>b<empty_output>",
    "a" * 200,
    " " * 100,
    "\n" * 50,
    "=" * 77,
    "ab" * 60,
    "1" * 50,
    "é" * 40,
    "語" * 40,
    "🙂" * 20,
    " a b c d e f g",
    "x\u00adsoft hy\u2010phen \u2013 \u2014 \u2212",
    "ſ K Å ﬁ ﬂ ǆ ǅ",
    "İstanbul ıI DŽ Straße STRASSE",
]

POOLS = {
    "letters": "etaoin shrdlu ETAOIN",
    "code": "abc_(){}[];:=+-*/<>.,\"' \n\t0123456789",
    "space": "  \t\n\r\u00a0\u3000ab1.",
    "digits": "0123456789 .,-٣५½²",
    "latin": "aàâäeéèêiîïoôöuùûüyÿçñß ÀÉÎÕÜ 'sStT",
    "wide": "中文日本語한국어ひらがなカタカナ。、！ a1",
    "emoji": "😀👍🏽❤️\u200d🇨🇭☃✈ a1\n",
    "scripts": "אבגדהוزحطيकखगघงจฉชабвгдежзαβγδε \u0301\u0308",
    "contractions": "'sStTmMdD'llve re RE\u2019 a",
}


def any_character(rng: random.Random) -> str:
    while True:
        character = chr(rng.randrange(0x20, 0x1FA00))
        if unicodedata.category(character) not in ("Cn", "Cs", "Co"):
            return character


def texts() -> list[str]:
    rng = random.Random(20)
    out = list(BY_HAND)
    for pool in POOLS.values():
        out += ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 60))) for _ in range(20)]
    out += ["".join(any_character(rng) for _ in range(rng.randrange(1, 25))) for _ in range(60)]
    everything = "".join(POOLS.values())
    out += ["".join(rng.choice(everything) for _ in range(rng.randrange(1, 80))) for _ in range(40)]
    return out


def symbols() -> dict[int, str]:
    """The printable characters of a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(hidden)) for byte in range(256)}


def learn_merges(corpus: list[str], count: int) -> list[tuple[str, str]]:
    symbol = symbols()
    words = [[symbol[byte] for byte in text.encode()] for text in corpus]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for i, word in enumerate(words):
            joined: list[str] = []
            for piece in word:
                if joined and (joined[-1], piece) == best:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            words[i] = joined
    return merges


def write_vocabulary(path: Path, pre: str, tokens: list[str], merges: list[tuple[str, str]]) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenize(path: Path, samples: list[str], special: bool) -> list[list[int]]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=special) if text else [] for text in samples]


def o200k_pieces(samples: list[str]) -> list[list[int]]:
    """Lengths of the pieces, in characters."""
    tiktoken_ext.openai_public.load_tiktoken_bpe = lambda *_, **__: {}  # the ranks would be downloaded
    pattern = regex.compile(tiktoken_ext.openai_public.o200k_base()["pat_str"])
    return [[len(piece) for piece in pattern.findall(text)] for text in samples]


def dump(name: str, content: object) -> None:
    (HERE / name).write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")


def main() -> None:
    model = Path(sys.argv[1])
    samples = texts()
    how = f"make_golden_tokens.py, llama-cpp-python {llama_cpp.__version__}, vocab_only, add_bos=False"
    plain, special = tokenize(model, samples, False), tokenize(model, samples, True)
    rows = [
        {"text": text, "ids": a} | ({"special_ids": b} if a != b else {})
        for text, a, b in zip(samples, plain, special, strict=True)
    ]
    dump("golden_smollm2_tokens.json", {"how": how, "model": model.name, "samples": rows})

    composed = [unicodedata.normalize("NFC", text) for text in samples]
    merges = learn_merges(composed, MERGES)
    tokens = [*symbols().values(), *dict.fromkeys(a + b for a, b in merges)]
    ids = {}
    with tempfile.TemporaryDirectory() as directory:
        for pre in PRE:
            path = Path(directory) / "vocabulary.gguf"
            write_vocabulary(path, pre, tokens, merges)
            ids[pre] = tokenize(path, composed, False)
    content = {"how": how, "tokens": tokens, "merges": [" ".join(m) for m in merges], "texts": composed, "ids": ids}
    dump("golden_pretokenizers.json", content | {"o200k_pieces": o200k_pieces(composed)})


if __name__ == "__main__":
    main()
