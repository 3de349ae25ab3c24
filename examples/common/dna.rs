//! DNA: FASTA files, and the character tokens of HyenaDNA.

use super::cli::Outcome;
use flate2::read::MultiGzDecoder;
use std::io::Read;
use std::path::Path;

/// The tokens of HyenaDNA by id; the letters follow.
const SPECIAL: [&str; 7] = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"];
const LETTERS: &[u8; 5] = b"ACGTN";
/// How many there are.
pub const VOCABULARY: usize = SPECIAL.len() + LETTERS.len();

/// The token of a letter in either case; of none, that of N.
pub fn token(letter: u8) -> (u8, bool) {
    let place = LETTERS.iter().position(|&known| known == letter.to_ascii_uppercase());
    ((SPECIAL.len() + place.unwrap_or(LETTERS.len() - 1)) as u8, place.is_some())
}

/// The text of a token.
pub fn text(id: u32) -> String {
    match (SPECIAL.get(id as usize), LETTERS.get((id as usize).wrapping_sub(SPECIAL.len()))) {
        (Some(name), _) => name.to_string(),
        (None, Some(&letter)) => char::from(letter).to_string(),
        (None, None) => "?".into(),
    }
}

/// The tokens of all sequences of a FASTA file, plain or compressed by gzip, one after another; foreign letters become N,
/// counted and reported.
pub fn read(path: &Path) -> Outcome<Vec<u8>> {
    let wrong = |reason: String| format!("{}: {reason}", path.display());
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let (tokens, foreign) = parse(bytes).map_err(wrong)?;
    if foreign > 0 {
        eprintln!(
            "{}: {foreign} of {} letters are none of ACGTN and were read as N",
            path.display(),
            tokens.len()
        );
    }
    Ok(tokens)
}

/// The tokens in the bytes of a file, and how many letters were foreign.
pub fn parse(mut bytes: Vec<u8>) -> Result<(Vec<u8>, usize), String> {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = vec![];
        let decoded = MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut plain);
        decoded.map_err(|error| format!("truncated or damaged gzip data: {error}"))?;
        bytes = plain;
    }
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    if !matches!(first, Some(b'>' | b';')) {
        return Err("expected a FASTA file, which begins with `>`".into());
    }
    let (mut tokens, mut foreign) = (vec![], 0);
    let lines = bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii_start);
    let lines = lines.filter(|line| !matches!(line.first(), Some(b'>' | b';')));
    for letter in lines.flatten().filter(|letter| !letter.is_ascii_whitespace()) {
        let (id, known) = token(*letter);
        foreign += usize::from(!known);
        tokens.push(id);
    }
    if tokens.is_empty() {
        return Err("no letters".into());
    }
    Ok((tokens, foreign))
}
