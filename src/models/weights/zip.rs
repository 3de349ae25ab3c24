//! The directory of a zip file, as far as PyTorch writes it: entries that are stored as they are.

use crate::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The largest directory that is read.
const MAX_DIRECTORY: u64 = 1 << 28;
/// End of directory: 22 bytes, then a comment of up to 64 KiB.
const END: usize = 22;
const END64_LOCATOR: usize = 20;
const END64: usize = 56;
const ENTRY: usize = 46;
const LOCAL: u64 = 30;

/// Where an entry's data lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// An open zip file: its entries by name.
pub(super) struct ZipFile {
    path: PathBuf,
    file: File,
    length: u64,
    /// Local header offset and size.
    entries: HashMap<String, (u64, u64)>,
}

impl ZipFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut zip = Self { path: path.into(), file, length, entries: HashMap::new() };
        let (start, size, count) = zip.directory()?;
        if size > MAX_DIRECTORY {
            return Err(zip.wrong("its directory is damaged"));
        }
        let directory = zip.read(start, size)?;
        zip.entries = zip.parse(&directory, count)?;
        Ok(zip)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The data of an entry, which must lie within the file.
    pub(super) fn find(&mut self, name: &str) -> Result<Option<Stored>> {
        let Some(&(header, size)) = self.entries.get(name) else { return Ok(None) };
        let local = self.read(header, LOCAL)?;
        if u32_at(&local, 0) != Some(0x0403_4b50) {
            return Err(self.wrong(&format!("the entry `{name}` is damaged")));
        }
        // the lengths of name and extra field may differ from those in the directory
        let skip = u64::from(u16_at(&local, 26).unwrap_or(0)) + u64::from(u16_at(&local, 28).unwrap_or(0));
        let offset = header.checked_add(LOCAL + skip);
        let end = offset.and_then(|offset| offset.checked_add(size));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= self.length => Ok(Some(Stored { offset, size })),
            _ => Err(self.wrong(&format!("truncated: the entry `{name}` ends beyond the file"))),
        }
    }

    /// `size` bytes at `offset`.
    pub(super) fn read(&mut self, offset: u64, size: u64) -> Result<Vec<u8>> {
        if offset.checked_add(size).is_none_or(|end| end > self.length) {
            return Err(self.wrong("truncated"));
        }
        let io = Error::io(&self.path);
        let mut bytes = vec![0; size as usize];
        let read = self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(io)?;
        Ok(bytes)
    }

    pub(super) fn wrong(&self, reason: &str) -> Error {
        let expected = "expected a PyTorch state dict in a zip file (torch.save since 1.6)";
        Error::File { path: self.path.clone(), reason: format!("{expected}: {reason}") }
    }

    /// Offset, size and number of entries of the directory.
    fn directory(&mut self) -> Result<(u64, u64, u64)> {
        let size = self.length.min((END + END64_LOCATOR + usize::from(u16::MAX)) as u64);
        let start = self.length - size;
        let tail = self.read(start, size)?;
        let found =
            (0..=tail.len().saturating_sub(END)).rev().find(|&i| u32_at(&tail, i) == Some(0x0605_4b50));
        let end = found.ok_or_else(|| self.wrong("no directory at the end of the file"))?;
        let number = |value: Option<u32>| u64::from(value.unwrap_or(0));
        let plain = (
            number(u32_at(&tail, end + 16)),
            number(u32_at(&tail, end + 12)),
            u64::from(u16_at(&tail, end + 10).unwrap_or(0)),
        );
        // files or counts too large for these fields have a second, wider record, found through a locator
        let locator = end.checked_sub(END64_LOCATOR).filter(|&i| u32_at(&tail, i) == Some(0x0706_4b50));
        let Some(record) = locator.and_then(|i| u64_at(&tail, i + 8)) else { return Ok(plain) };
        let record = self.read(record, END64 as u64)?;
        if u32_at(&record, 0) != Some(0x0606_4b50) {
            return Err(self.wrong("its directory is damaged"));
        }
        let wide = |at| u64_at(&record, at).unwrap_or(0);
        Ok((wide(48), wide(40), wide(32)))
    }

    fn parse(&self, directory: &[u8], count: u64) -> Result<HashMap<String, (u64, u64)>> {
        let damaged = || self.wrong("its directory is damaged");
        let mut entries = HashMap::new();
        let mut at = 0;
        for _ in 0..count {
            if u32_at(directory, at) != Some(0x0201_4b50) {
                return Err(damaged());
            }
            let short = |field| u16_at(directory, at + field).map(usize::from).ok_or_else(damaged);
            let long = |field| u32_at(directory, at + field).map(u64::from).ok_or_else(damaged);
            let (name, extra, comment) = (short(28)?, short(30)?, short(32)?);
            let (packed, mut size, mut header) = (long(20)?, long(24)?, long(42)?);
            let bytes = directory.get(at + ENTRY..at + ENTRY + name).ok_or_else(damaged)?;
            let name_text = String::from_utf8_lossy(bytes).into_owned();
            let extra_start = at + ENTRY + name;
            let extra_field = directory.get(extra_start..extra_start + extra).ok_or_else(damaged)?;
            let limit = u64::from(u32::MAX);
            let mut wide = wide_fields(extra_field).into_iter();
            for (field, narrow) in [(&mut size, None), (&mut 0, Some(packed)), (&mut header, None)] {
                if narrow.unwrap_or(*field) == limit {
                    *field = wide.next().ok_or_else(damaged)?;
                }
            }
            if short(10)? != 0 {
                return Err(self.wrong(&format!("the entry `{name_text}` is compressed")));
            }
            entries.insert(name_text, (header, size));
            at = extra_start + extra + comment;
        }
        Ok(entries)
    }
}

/// The 64-bit fields of an entry's extra field (record 1), in order.
fn wide_fields(mut extra: &[u8]) -> Vec<u64> {
    while let (Some(kind), Some(size)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let Some(body) = extra.get(4..4 + usize::from(size)) else { break };
        if kind == 1 {
            return (0..body.len() / 8).filter_map(|i| u64_at(body, 8 * i)).collect();
        }
        extra = &extra[4 + usize::from(size)..];
    }
    vec![]
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}
