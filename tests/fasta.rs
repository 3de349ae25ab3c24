//! FASTA files as the program `hyena` reads them: plain and gzip, foreign letters, damage.

#[path = "../examples/common/dna.rs"]
mod dna;

/// What the program's module takes from its neighbour.
mod cli {
    pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;
}

use flate2::{Compression, write::GzEncoder};
use std::io::Write;

const FILE: &[u8] = b">one\r\nACGT\r\nacgtn\r\n\n; a remark\n>two ACGT\n  GATTACA \n";
const LETTERS: &str = "ACGTACGTNGATTACA";

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(vec![], Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn letters(bytes: &[u8]) -> (String, usize) {
    let (tokens, foreign) = dna::parse(bytes.to_vec()).unwrap();
    assert!(tokens.iter().all(|&token| usize::from(token) < dna::VOCABULARY));
    (tokens.into_iter().map(|token| dna::text(token.into())).collect(), foreign)
}

#[test]
fn plain_and_compressed_are_the_same() {
    assert_eq!(letters(FILE), (LETTERS.to_string(), 0));
    assert_eq!(letters(&gzip(FILE)), (LETTERS.to_string(), 0));
    // as bgzip writes: several members one after another
    let members = [gzip(&FILE[..20]), gzip(&FILE[20..])].concat();
    assert_eq!(letters(&members), (LETTERS.to_string(), 0));
}

#[test]
fn tokens_are_those_of_hyena_dna() {
    let ids: Vec<u8> = b"ACGTN".iter().map(|&letter| dna::token(letter).0).collect();
    assert_eq!(ids, [7, 8, 9, 10, 11]);
    assert_eq!(dna::text(4), "[PAD]");
    assert_eq!(dna::text(12), "?");
}

#[test]
fn foreign_letters_become_n_and_are_counted() {
    assert_eq!(letters(b">x\nARNYu*-T\n"), ("ANNNNNNT".to_string(), 5));
}

#[test]
fn damage_is_a_clear_error() {
    let error = |bytes: &[u8]| dna::parse(bytes.to_vec()).unwrap_err();
    let whole = gzip(FILE);
    for cut in 2..whole.len() {
        assert!(error(&whole[..cut]).contains("truncated or damaged gzip"), "cut at {cut}");
    }
    let mut flipped = whole.clone();
    let end = flipped.len() - 8;
    flipped[end] ^= 1;
    assert!(error(&flipped).contains("gzip"));
    for bytes in [&b""[..], b"ACGT", b"\n\n@read\nACGT"] {
        assert!(error(bytes).contains("begins with `>`"));
    }
    assert!(error(b">name alone").contains("no letters"));
}

#[test]
fn a_file_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), FILE).unwrap();
    assert_eq!(dna::read(file.path()).unwrap().len(), LETTERS.len());
    std::fs::write(file.path(), &gzip(FILE)[..30]).unwrap();
    let message = dna::read(file.path()).unwrap_err().to_string();
    assert!(message.contains(file.path().to_str().unwrap()) && message.contains("gzip"), "{message}");
    assert!(dna::read(std::path::Path::new("nowhere.fa")).unwrap_err().to_string().contains("nowhere.fa"));
}
