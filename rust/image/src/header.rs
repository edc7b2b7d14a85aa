//! The first page of the file: readable, and checked, without the rest.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

use crate::checksum;
use crate::codec::Codec;
use crate::error::Error;
use crate::layout::{DATA_START, HEADER_LEN, MAGIC, MAJOR, MINOR, PAGE_SIZE};

const JSON_AT: usize = 16;
const CHECKSUM_AT: usize = HEADER_LEN - 8;
const MAX_TEXT: usize = 64;
const MAX_PATH: usize = 1024;
const PART: &str = "header";
/// Required of the reader of an image that has a parent.
pub(crate) const PARENT: &str = "parent";
/// Required of the reader of an image that holds TCP connections, or sockets whose connection was closed in the image:
/// one that does not know them would make fresh sockets in their place.
pub const CONNECTIONS: &str = "connections";
/// Required of the reader of an image of tasks that have in common what processes have apart, or apart what threads have in
/// common: one that does not know them would make them otherwise.
pub const SHARING: &str = "sharing";
/// Required of the reader of an image in whose sockets there is more in flight than older ones know: open files, credentials,
/// connections in unix sockets, datagrams in UDP sockets. One that does not know them would leave them out.
pub const IN_FLIGHT: &str = "in-flight";
/// Required of the reader of an image that holds objects of System V IPC, or limits of theirs: one that does not know them
/// would leave them out.
pub const SYSTEM_V: &str = "system-v-ipc";
/// The abilities that this reader has, each with the minor version that brought it.
const KNOWN: [(&str, u16); 7] = [
    (PARENT, 1),
    ("lz4", 1),
    ("zstd", 1),
    (CONNECTIONS, 2),
    (SHARING, 3),
    (IN_FLIGHT, 3),
    (SYSTEM_V, 3),
];

/// The image that an image goes on from: known by its content, so that another one at the same place is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its directory, relative to that of the image.
    pub path: String,
    /// Its total digest, as [`crate::Reader::digest`] returns it.
    pub digest: String,
    /// Its uuid.
    pub uuid: String,
}

/// What the header page says about the image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeaderInfo {
    /// Machine architecture, as Rust names it (`x86_64`, `aarch64`).
    pub arch: String,
    /// Page size of the machine and of the page area.
    pub page_size: u32,
    /// Different for every image.
    pub uuid: String,
    /// When the image was begun, RFC 3339 in UTC.
    pub created: String,
    /// Version of torpor that wrote it.
    pub torpor: String,
    /// Abilities that a reader must have to understand the image; one that lacks any of them refuses it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
    /// The image in which the pages are that this one does not hold itself. Set by [`crate::Writer::create_child`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// Keys that this version does not know.
    #[serde(flatten)]
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl HeaderInfo {
    /// A header for an image made now, on this machine, by torpor `version`.
    pub fn new(version: &str) -> HeaderInfo {
        HeaderInfo {
            arch: std::env::consts::ARCH.to_owned(),
            page_size: host_page_size(),
            uuid: new_uuid(),
            created: rfc3339(SystemTime::now()),
            torpor: version.to_owned(),
            requires: Vec::new(),
            parent: None,
            extra: BTreeMap::new(),
        }
    }

    /// The header page.
    pub(crate) fn encode(&self, path: &Path) -> Result<Vec<u8>, Error> {
        self.check_texts().map_err(|detail| Error::misuse(path, PART, detail))?;
        if self.page_size != PAGE_SIZE {
            // The page area of format 1 counts in units of 4 KiB.
            return Err(self.wrong_page_size(path, PAGE_SIZE));
        }
        let json = serde_json::to_vec(self).map_err(|error| Error::misuse(path, PART, error.to_string()))?;
        if json.len() > CHECKSUM_AT - JSON_AT {
            return Err(Error::misuse(
                path,
                PART,
                format!("{} bytes of JSON do not fit", json.len()),
            ));
        }
        let mut page = vec![0; HEADER_LEN];
        page[..8].copy_from_slice(&MAGIC);
        page[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        page[10..12].copy_from_slice(&self.minor().to_le_bytes());
        page[12..16].copy_from_slice(&(json.len() as u32).to_le_bytes());
        page[JSON_AT..JSON_AT + json.len()].copy_from_slice(&json);
        let sum = checksum::of(&page[..CHECKSUM_AT]);
        page[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
        Ok(page)
    }

    /// Reads a header page; `page` is shorter than one only if the file is. Also returns the minor version.
    pub(crate) fn decode(page: &[u8], path: &Path) -> Result<(HeaderInfo, u16), Error> {
        let corrupt = |detail: &str| Error::corrupt(path, PART, detail);
        if page.is_empty() {
            return Err(corrupt("the file is empty"));
        }
        let marked = page.len().min(MAGIC.len());
        if page[..marked] != MAGIC[..marked] {
            return Err(corrupt("this is not a torpor checkpoint: it does not begin as one"));
        }
        if page.len() < HEADER_LEN {
            return Err(corrupt("the file is truncated: it ends inside its header"));
        }
        // The place of this checksum is the same in all major versions, so a flipped bit is never taken for another version.
        if checksum::of(&page[..CHECKSUM_AT]).to_le_bytes() != page[CHECKSUM_AT..HEADER_LEN] {
            return Err(corrupt("wrong checksum"));
        }
        let major = u16::from_le_bytes([page[8], page[9]]);
        let minor = u16::from_le_bytes([page[10], page[11]]);
        if major != MAJOR {
            return Err(Error::Version {
                path: path.to_path_buf(),
                major,
                minor,
            });
        }
        let len = u32::from_le_bytes([page[12], page[13], page[14], page[15]]) as usize;
        let json = JSON_AT
            .checked_add(len)
            .and_then(|end| page[..CHECKSUM_AT].get(JSON_AT..end));
        let json = json.ok_or_else(|| corrupt("its JSON is longer than the page"))?;
        let info: HeaderInfo = serde_json::from_slice(json).map_err(|error| corrupt(&format!("its JSON: {error}")))?;
        info.check_texts().map_err(|detail| corrupt(&detail))?;
        Ok((info, minor))
    }

    /// What it requires for what it holds, not for how the file holds it.
    pub(crate) fn of_content(&self) -> Vec<String> {
        let is_of_file = |word: &&String| *word == PARENT || Codec::of(std::slice::from_ref(word)).is_some();
        self.requires.iter().filter(|word| !is_of_file(word)).cloned().collect()
    }

    /// The lowest minor version that has what is in the image.
    fn minor(&self) -> u16 {
        let since = |word: &String| {
            KNOWN
                .iter()
                .find(|(known, _)| known == word)
                .map_or(MINOR, |(_, minor)| *minor)
        };
        self.requires.iter().map(since).max().unwrap_or(0)
    }

    /// Refuses an image that needs what this program does not know.
    pub(crate) fn check_known(&self, path: &Path) -> Result<(), Error> {
        match self
            .requires
            .iter()
            .find(|word| KNOWN.iter().all(|(known, _)| known != word))
        {
            Some(feature) => Err(Error::Feature {
                path: path.to_path_buf(),
                section: PART.to_owned(),
                feature: feature.clone(),
            }),
            None if self.page_size != PAGE_SIZE => Err(self.wrong_page_size(path, PAGE_SIZE)),
            None => Ok(()),
        }
    }

    /// Refuses an image that this machine cannot run.
    pub(crate) fn check_host(&self, path: &Path) -> Result<(), Error> {
        let host = std::env::consts::ARCH;
        if self.arch != host {
            return Err(Error::Arch {
                path: path.to_path_buf(),
                what: "architecture",
                found: self.arch.clone(),
                host: host.to_owned(),
            });
        }
        if self.page_size != host_page_size() {
            return Err(self.wrong_page_size(path, host_page_size()));
        }
        Ok(())
    }

    fn wrong_page_size(&self, path: &Path, wanted: u32) -> Error {
        Error::Arch {
            path: path.to_path_buf(),
            what: "page size",
            found: self.page_size.to_string(),
            host: wanted.to_string(),
        }
    }

    /// The texts are shown to people: short and printable, so that an image cannot drive a terminal.
    fn check_texts(&self) -> Result<(), String> {
        let named = [
            ("arch", &self.arch),
            ("uuid", &self.uuid),
            ("created", &self.created),
            ("torpor", &self.torpor),
        ];
        let required = self.requires.iter().map(|feature| ("requires", feature));
        for (key, text) in named.into_iter().chain(required) {
            if text.is_empty()
                || text.len() > MAX_TEXT
                || !text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
            {
                return Err(format!("{key} is not a short printable text"));
            }
        }
        if self.parent.is_some() != self.requires.iter().any(|word| word == PARENT) {
            return Err("parent without requiring it, or the other way round".to_owned());
        }
        self.parent.as_ref().map_or(Ok(()), Parent::check)
    }
}

impl Parent {
    fn check(&self) -> Result<(), String> {
        let path = &self.path;
        if path.is_empty() || path.len() > MAX_PATH || path.starts_with('/') || path.contains(char::is_control) {
            return Err(format!(
                "the path of the parent is not a relative one of at most {MAX_PATH} bytes"
            ));
        }
        let is_digest = self.digest.len() == 32 && self.digest.bytes().all(|b| b.is_ascii_hexdigit());
        let is_uuid = (1..=MAX_TEXT).contains(&self.uuid.len()) && self.uuid.bytes().all(|b| b.is_ascii_graphic());
        if !is_digest || !is_uuid {
            return Err("digest or uuid of the parent is not one".to_owned());
        }
        Ok(())
    }
}

fn host_page_size() -> u32 {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| u32::try_from(size).ok()).unwrap_or(PAGE_SIZE)
}

fn new_uuid() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    let kernel = kernel.trim();
    if kernel.len() == 36 {
        return kernel.to_owned();
    }
    // Without /proc: each RandomState is keyed from the kernel's random numbers, which is all that std offers.
    let (high, low) = (RandomState::new().hash_one(1), RandomState::new().hash_one(2));
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xfff,
        0x8000 | (low >> 48) & 0x3fff,
        low & 0xffff_ffff_ffff
    )
}

/// Random enough to name a temporary file.
pub(crate) fn random_name() -> String {
    format!("{:016x}", RandomState::new().hash_one(DATA_START))
}

fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date, in eras of 400 years that begin on 1 March (H. Hinnant, "chrono-compatible low-level date algorithms").
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_rfc3339() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(at(1_709_251_200), "2024-03-01T00:00:00Z");
        assert_eq!(at(4_102_444_799), "2099-12-31T23:59:59Z");
    }

    #[test]
    fn a_header_comes_back_with_keys_of_later_versions() {
        let mut info = HeaderInfo::new("0.1.0");
        info.extra.insert("mood".to_owned(), serde_json::json!({"calm": true}));
        let page = info.encode(Path::new("x")).unwrap();
        assert_eq!(page.len(), HEADER_LEN);
        assert_eq!(HeaderInfo::decode(&page, Path::new("x")).unwrap(), (info.clone(), 0));
        assert_eq!(info.uuid.len(), 36);
        assert_ne!(info.uuid, HeaderInfo::new("0.1.0").uuid);
    }

    #[test]
    fn texts_that_could_drive_a_terminal_are_refused() {
        for text in ["", "a\x1b[2J", "a\nb", "é", &"x".repeat(65)] {
            let info = HeaderInfo {
                torpor: text.to_owned(),
                ..HeaderInfo::new("1")
            };
            assert_eq!(info.encode(Path::new("x")).unwrap_err().code(), "internal", "{text:?}");
        }
    }
}
