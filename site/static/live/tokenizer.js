// A byte-level BPE, read from a tokenizer.json of the `tokenizers` library.
// The same ids as `tokenizer(text)` in Python: BOS first where the file's template says so.

const PIECES =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

// GPT-2's alphabet: a printable character for each of the 256 bytes.
function byteAlphabet() {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  const characters = [];
  for (let b = 0, spare = 256; b < 256; b++) {
    characters.push(String.fromCodePoint(printable(b) ? b : spare++));
  }
  return characters;
}

export class Tokenizer {
  constructor(file) {
    const { model, pre_tokenizer: pre } = file;
    if (model.type !== "BPE" || pre?.type !== "ByteLevel" || pre.add_prefix_space) {
      throw new Error("Expected a byte-level BPE without a prefix space in tokenizer.json.");
    }
    this.vocabulary = new Map(Object.entries(model.vocab));
    this.tokens = [];
    for (const [token, id] of this.vocabulary) this.tokens[id] = token;
    const key = (merge) => (Array.isArray(merge) ? merge.join(" ") : merge);
    this.ranks = new Map(model.merges.map((merge, rank) => [key(merge), rank]));
    this.special = new Map(file.added_tokens.map((token) => [token.content, token.id]));
    for (const [content, id] of this.special) this.tokens[id] = content;
    const template = file.post_processor?.single ?? [];
    const first = template.findIndex((part) => part.Sequence);
    this.before = template
      .slice(0, Math.max(0, first))
      .map((part) => this.special.get(part.SpecialToken.id));
    this.alphabet = byteAlphabet();
    this.bytes = new Map(this.alphabet.map((character, byte) => [character, byte]));
    this.known = new Map(); // ids of pieces that were seen before
  }

  // What the template puts first, then the text's ids.
  encode(text) {
    return [...this.before, ...this.encodeBare(text)];
  }

  encodeBare(text) {
    const ids = [];
    let rest = text;
    while (rest) {
      const [at, content] = this.nextSpecial(rest);
      for (const piece of rest.slice(0, at).match(PIECES) ?? []) {
        for (const id of this.pieceIds(piece)) ids.push(id);
      }
      if (content) ids.push(this.special.get(content));
      rest = rest.slice(at + content.length);
    }
    return ids;
  }

  // Where the first special token is written in the text, and which one.
  nextSpecial(text) {
    let found = [text.length, ""];
    for (const content of this.special.keys()) {
      const at = text.indexOf(content);
      if (at >= 0 && at < found[0]) found = [at, content];
    }
    return found;
  }

  pieceIds(piece) {
    if (!this.known.has(piece)) {
      const bytes = new TextEncoder().encode(piece);
      let parts = Array.from(bytes, (byte) => this.alphabet[byte]);
      for (;;) {
        let best = Infinity;
        let at = -1;
        for (let i = 0; i + 1 < parts.length; i++) {
          const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
          if (rank < best) [best, at] = [rank, i];
        }
        if (at < 0) break;
        parts.splice(at, 2, parts[at] + parts[at + 1]);
      }
      this.known.set(piece, parts.map((part) => this.vocabulary.get(part)));
    }
    return this.known.get(piece);
  }

  // The text of ids; special tokens are left out. Half a character becomes U+FFFD.
  decode(ids) {
    const bytes = [];
    const special = new Set(this.special.values());
    for (const id of ids) {
      if (special.has(id)) continue;
      for (const character of this.tokens[id]) bytes.push(this.bytes.get(character));
    }
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
  }
}
