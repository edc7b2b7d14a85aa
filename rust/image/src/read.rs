//! Reading. Nothing in a file is believed before it is checked: lengths against the file, bytes against their checksum, records against
//! the rules of the format. A damaged or hostile file gives an [`Error`], never a panic and never a large allocation.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nix::errno::Errno;
use nix::libc::O_NONBLOCK;
use serde::de::DeserializeOwned;

use crate::checksum::{self, Rolling};
use crate::error::Error;
use crate::header::HeaderInfo;
use crate::layout::{
    ALIGN, BLOCK_SIZE, BlobRef, DATA_START, ENTRY_LEN, FILE_NAME, HEADER_LEN, INDEX_NAME, MAX_DATA, MAX_JSON, MAX_RUNS,
    MAX_SECTIONS, MINOR, PageRun, RUN_LEN, SECTION_MUST_KNOW, SectionInfo, SectionKind, TRAILER_LEN, Trailer, align_up,
    u64_at,
};
use crate::write::digest;

/// [`Reader::blob`] refuses larger blobs; [`Reader::blob_reader`] does not hold them in memory.
pub const MAX_BLOB_IN_MEMORY: u64 = 64 << 20;

const CHUNK: usize = 1 << 20;
const VERIFY_THREADS: usize = 4;
const FOOTER: &str = "footer";
const INDEX: &str = "page index";

/// An image that was opened and, but for its data blocks, verified.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
    len: u64,
    info: HeaderInfo,
    minor: u16,
    trailer: Trailer,
    sections: Vec<SectionInfo>,
    runs: Vec<PageRun>,
    blocks: Vec<u64>,
}

impl Reader {
    /// Opens a `checkpoint.img`, or the one in a directory, and checks all of it except the data blocks, which [`Reader::verify`] reads.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Permission`], [`Error::Corrupt`]; [`Error::Version`] and [`Error::Feature`] if a newer torpor is
    /// needed; [`Error::Arch`] if it was made on another kind of machine.
    pub fn open(path: &Path) -> Result<Reader, Error> {
        let reader = Reader::open_foreign(path)?;
        reader.info.check_host(&reader.path)?;
        Ok(reader)
    }

    /// As [`Reader::open`], but accepts images of other machines: to look at, not to restore.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn open_foreign(path: &Path) -> Result<Reader, Error> {
        let (file, path, len) = open_file(path)?;
        let source = Source {
            file: &file,
            path: &path,
        };
        let mut header = vec![0; len.min(HEADER_LEN as u64) as usize];
        source.read("header", 0, &mut header)?;
        let (info, minor) = HeaderInfo::decode(&header, &path)?;
        info.check_known(&path)?;
        let (trailer, tables) = read_footer(&source, len, &header)?;
        let (entries, sums) = tables.split_at(trailer.section_count as usize * ENTRY_LEN);
        let sections = read_section_table(&path, entries, minor)?;
        check_sections(&source, &trailer, &sections)?;
        let runs = read_index(&source, &trailer, &sections)?;
        let blocks = sums.chunks_exact(8).map(|raw| u64_at(raw, 0)).collect();
        Ok(Reader {
            file,
            path,
            len,
            info,
            minor,
            trailer,
            sections,
            runs,
            blocks,
        })
    }

    /// Reads the header page alone: quick, and works for images of other machines.
    ///
    /// # Errors
    /// As [`Reader::open`], for what the header tells.
    pub fn peek(path: &Path) -> Result<HeaderInfo, Error> {
        let (file, path, len) = open_file(path)?;
        let mut header = vec![0; len.min(HEADER_LEN as u64) as usize];
        Source {
            file: &file,
            path: &path,
        }
        .read("header", 0, &mut header)?;
        Ok(HeaderInfo::decode(&header, &path)?.0)
    }

    /// What the header says.
    pub fn header(&self) -> &HeaderInfo {
        &self.info
    }

    /// Major and minor format version.
    pub fn version(&self) -> (u16, u16) {
        (crate::MAJOR, self.minor)
    }

    /// Names the content: 32 hexadecimal digits. Against accidents, not against forgery.
    pub fn digest(&self) -> String {
        format!("{:032x}", self.trailer.digest)
    }

    /// All sections in file order, also those of a newer version.
    pub fn sections(&self) -> impl Iterator<Item = &SectionInfo> {
        self.sections.iter()
    }

    /// Reads a JSON section. Its checksum is compared again, as the file may have changed since it was opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if there is no such section or its content is not what `T` wants.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let bytes = self.section_bytes(name)?;
        serde_json::from_slice(&bytes).map_err(|error| self.corrupt(named(name), error.to_string()))
    }

    /// The bytes of a section, for whoever wants to show it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if there is no such section, or it is larger than a JSON section may be.
    pub fn section_bytes(&self, name: &str) -> Result<Vec<u8>, Error> {
        let section = self.sections.iter().find(|section| section.name == name);
        let section = section.ok_or_else(|| self.corrupt(named(name), "it is missing"))?;
        if section.len > MAX_JSON {
            return Err(self.corrupt(named(name), format!("{} bytes are more than {MAX_JSON}", section.len)));
        }
        let mut bytes = vec![0; section.len as usize];
        self.source().read(&named(name), section.offset, &mut bytes)?;
        if checksum::of(&bytes) != section.checksum {
            return Err(self.corrupt(named(name), "wrong checksum"));
        }
        Ok(bytes)
    }

    /// The page index: sorted by space and start, without overlap.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// The part of the page index that is about one space.
    pub fn runs_of(&self, space: u32) -> &[PageRun] {
        let from = self.runs.partition_point(|run| run.space < space);
        let len = self.runs[from..].partition_point(|run| run.space == space);
        &self.runs[from..from + len]
    }

    /// Reads every data block and compares its checksum, with up to four threads.
    ///
    /// # Errors
    /// [`Error::Corrupt`] with the offset of the first block that is wrong; [`Error::Io`].
    pub fn verify(&self) -> Result<(), Error> {
        let available = thread::available_parallelism().map_or(1, |count| count.get());
        // A thread for less than 8 MiB costs more than it saves.
        let threads = available.min(VERIFY_THREADS).min(self.blocks.len() / 8).max(1);
        let next = AtomicU64::new(0);
        let mut failures: Vec<(u64, Error)> = thread::scope(|scope| {
            let workers: Vec<_> = (1..threads)
                .map(|_| scope.spawn(|| self.verify_blocks(&next)))
                .collect();
            let own = self.verify_blocks(&next);
            let others = workers.into_iter().map(|worker| worker.join());
            // A worker has nothing that panics; should it ever, its blocks count as not verified.
            let joined =
                others.map(|result| result.unwrap_or_else(|_| Err((0, self.corrupt("data", "verifying failed")))));
            joined.chain([own]).filter_map(Result::err).collect()
        });
        failures.sort_by_key(|(block, _)| *block);
        failures.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Reads the checksummed block that holds the byte at `offset` of the file, and checks it: for whoever cannot wait for
    /// [`Reader::verify`]. Returns the offset of its first byte; `buffer` then holds the block and nothing else.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is not what was written, or no such block exists; [`Error::Io`].
    pub fn read_block(&self, offset: u64, buffer: &mut Vec<u8>) -> Result<u64, Error> {
        let block = offset.checked_sub(DATA_START).map(|at| at / BLOCK_SIZE as u64);
        let known = block.and_then(|block| Some((block, *self.blocks.get(usize::try_from(block).ok()?)?)));
        let Some((block, expected)) = known else {
            return Err(self.corrupt("data", format!("no data at offset {offset}")));
        };
        let begin = block * BLOCK_SIZE as u64;
        let len = (self.trailer.data_len - begin).min(BLOCK_SIZE as u64) as usize;
        buffer.resize(len, 0);
        self.source().read("data", DATA_START + begin, buffer)?;
        if checksum::of(buffer) != expected {
            let why = format!("wrong checksum of the {len} bytes at offset {}", DATA_START + begin);
            return Err(self.corrupt("data", why));
        }
        Ok(DATA_START + begin)
    }

    /// Takes block after block until none is left. Blocks are handed out in order, so the first failure of each worker is enough to
    /// find the first of all.
    fn verify_blocks(&self, next: &AtomicU64) -> Result<(), (u64, Error)> {
        let mut buffer = vec![0; BLOCK_SIZE.min(self.trailer.data_len as usize)];
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            let Some(&expected) = self.blocks.get(block as usize) else {
                return Ok(());
            };
            let begin = block * BLOCK_SIZE as u64;
            let len = (self.trailer.data_len - begin).min(BLOCK_SIZE as u64) as usize;
            let offset = DATA_START + begin;
            let failed = match self.source().read("data", offset, &mut buffer[..len]) {
                Err(error) => error,
                Ok(()) if checksum::of(&buffer[..len]) == expected => continue,
                Ok(()) => self.corrupt("data", format!("wrong checksum of the {len} bytes at offset {offset}")),
            };
            // Later blocks need no look, earlier ones are already in the hands of others.
            next.fetch_max(self.blocks.len() as u64, Ordering::Relaxed);
            return Err((block, failed));
        }
    }

    /// Reads data of the page area. What [`Reader::verify`] found good may be believed.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if that is not in the data area; [`Error::Io`].
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.check_range(offset, buf.len() as u64)?;
        self.source().read("data", offset, buf)
    }

    /// Reads a blob of at most [`MAX_BLOB_IN_MEMORY`] bytes.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if that is not in the data area or larger; [`Error::Io`].
    pub fn blob(&self, blob: BlobRef) -> Result<Vec<u8>, Error> {
        self.check_range(blob.offset, blob.len)?;
        if blob.len > MAX_BLOB_IN_MEMORY {
            return Err(self.corrupt(
                "data",
                format!("a blob of {} bytes is more than {MAX_BLOB_IN_MEMORY}", blob.len),
            ));
        }
        let mut bytes = vec![0; blob.len as usize];
        self.source().read("data", blob.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a blob of any size, piece by piece.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if that is not in the data area.
    pub fn blob_reader(&self, blob: BlobRef) -> Result<BlobReader<'_>, Error> {
        self.check_range(blob.offset, blob.len)?;
        Ok(BlobReader {
            file: &self.file,
            offset: blob.offset,
            left: blob.len,
        })
    }

    /// The file, for whoever maps it or reads it in another way.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length of the file.
    #[expect(clippy::len_without_is_empty, reason = "an image is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Length of the data area.
    pub fn data_len(&self) -> u64 {
        self.trailer.data_len
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), Error> {
        let data_end = DATA_START + self.trailer.data_len;
        match offset.checked_add(len) {
            Some(end) if offset >= DATA_START && end <= data_end => Ok(()),
            _ => Err(self.corrupt(
                "data",
                format!("{len} bytes at offset {offset} are not in the data area"),
            )),
        }
    }

    fn source(&self) -> Source<'_> {
        Source {
            file: &self.file,
            path: &self.path,
        }
    }

    fn corrupt(&self, section: impl Into<String>, detail: impl Into<String>) -> Error {
        Error::corrupt(&self.path, section, detail)
    }
}

/// The bytes of one blob.
#[derive(Debug)]
pub struct BlobReader<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for BlobReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let count = self.file.read_at(&mut buf[..want], self.offset)?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the image became shorter while it was read",
            ));
        }
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// The file with its name, for reads whose errors say where.
struct Source<'a> {
    file: &'a File,
    path: &'a Path,
}

impl Source<'_> {
    fn read(&self, section: &str, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.file
            .read_exact_at(buf, offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => self.corrupt(section, "the file became shorter while it was read"),
                _ => Error::io(self.path, "read", error),
            })
    }

    /// Hands a range over in chunks.
    fn stream(
        &self,
        section: &str,
        offset: u64,
        len: u64,
        mut take: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut buffer = vec![0; len.min(CHUNK as u64) as usize];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(CHUNK as u64) as usize;
            self.read(section, offset + done, &mut buffer[..piece])?;
            take(&buffer[..piece])?;
            done += piece as u64;
        }
        Ok(())
    }

    fn corrupt(&self, section: impl Into<String>, detail: impl Into<String>) -> Error {
        Error::corrupt(self.path, section, detail)
    }
}

fn named(name: &str) -> String {
    format!("section {name:?}")
}

/// Opens the image itself or the one in a directory.
fn open_file(path: &Path) -> Result<(File, PathBuf, u64), Error> {
    // O_NONBLOCK: a FIFO must be refused, not waited for.
    let open = |path: &Path| {
        let opened = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path);
        let file = opened.map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENOTDIR) => Error::Missing {
                path: path.to_path_buf(),
            },
            _ => Error::io(path, "open", error),
        })?;
        let found = file.metadata().map_err(|error| Error::io(path, "examine", error))?;
        Ok::<_, Error>((file, found))
    };
    let mut path = path.to_path_buf();
    let (mut file, mut found) = open(&path)?;
    if found.is_dir() {
        path.push(FILE_NAME);
        (file, found) = open(&path)?;
    }
    if !found.is_file() {
        return Err(Error::corrupt(&path, "file", "it is not a regular file"));
    }
    Ok((file, path, found.len()))
}

/// Reads the trailer and both tables and checks the total digest.
fn read_footer(source: &Source<'_>, len: u64, header: &[u8]) -> Result<(Trailer, Vec<u8>), Error> {
    let corrupt = |detail: &str| source.corrupt(FOOTER, detail);
    let trailer_at = len.checked_sub(TRAILER_LEN as u64).filter(|&at| at >= DATA_START);
    let trailer_at = trailer_at.ok_or_else(|| corrupt("the file is truncated: it ends after its header"))?;
    let mut raw = [0; TRAILER_LEN];
    source.read(FOOTER, trailer_at, &mut raw)?;
    let (trailer, stated) = Trailer::decode(&raw).map_err(corrupt)?;
    if trailer.file_len != len {
        return Err(corrupt("the file does not have the length that it states"));
    }
    // From here on every length is bounded by that of the file, and by the limits of the format.
    if trailer.data_len > MAX_DATA || trailer.data_len > trailer_at - DATA_START {
        return Err(corrupt("the data area does not fit into the file"));
    }
    if trailer.block_size != BLOCK_SIZE as u32 || trailer.block_count != Trailer::blocks_of(trailer.data_len) {
        return Err(corrupt("the number of data blocks is wrong"));
    }
    if trailer.section_count == 0 || trailer.section_count > MAX_SECTIONS {
        return Err(corrupt("the number of sections is out of range"));
    }
    let footer_len = trailer
        .footer_len()
        .filter(|&footer| footer == stated && footer <= len - DATA_START - trailer.data_len);
    let footer_len = footer_len.ok_or_else(|| corrupt("its length is wrong"))?;
    let mut tables = vec![0; footer_len as usize - TRAILER_LEN];
    source.read(FOOTER, len - footer_len, &mut tables)?;
    if digest(header, &tables, &trailer) != trailer.digest {
        return Err(corrupt("wrong checksum"));
    }
    Ok((trailer, tables))
}

fn read_section_table(path: &Path, entries: &[u8], minor: u16) -> Result<Vec<SectionInfo>, Error> {
    let corrupt = |detail: String| Error::corrupt(path, FOOTER, detail);
    let newer = minor > MINOR;
    let mut sections: Vec<SectionInfo> = Vec::with_capacity(entries.len() / ENTRY_LEN);
    for raw in entries.chunks_exact(ENTRY_LEN) {
        let section = SectionInfo::decode(raw).ok_or_else(|| corrupt("a section without a proper name".to_owned()))?;
        let name = &section.name;
        if sections.iter().any(|other| other.name == *name) {
            return Err(corrupt(format!("two sections named {name:?}")));
        }
        let limit = match section.kind {
            SectionKind::Json => MAX_JSON,
            SectionKind::Index => MAX_RUNS * RUN_LEN as u64,
            SectionKind::Unknown(_) => u64::MAX,
        };
        if section.len > limit {
            return Err(corrupt(format!(
                "section {name:?} has {} bytes, more than {limit}",
                section.len
            )));
        }
        if let SectionKind::Unknown(kind) = section.kind {
            if !newer {
                return Err(corrupt(format!("section {name:?} is of unknown kind {kind}")));
            }
            if section.flags & SECTION_MUST_KNOW != 0 {
                return Err(Error::Feature {
                    path: path.to_path_buf(),
                    section: named(name),
                    feature: format!("kind {kind}"),
                });
            }
        }
        if !newer && section.flags != 0 {
            return Err(corrupt(format!("section {name:?} has unknown flags")));
        }
        sections.push(section);
    }
    Ok(sections)
}

/// Checks that the sections fill the file from the data area to the footer, with nothing but zeros between them, and each one's checksum.
fn check_sections(source: &Source<'_>, trailer: &Trailer, sections: &[SectionInfo]) -> Result<(), Error> {
    let footer_at = trailer.file_len - trailer.footer_len().unwrap_or(0);
    let mut end = DATA_START + trailer.data_len;
    for section in sections {
        let begin = skip_padding(source, end, footer_at)?;
        let section_end = begin
            .checked_add(section.len)
            .filter(|&end| section.offset == begin && end <= footer_at);
        end = section_end
            .ok_or_else(|| source.corrupt(FOOTER, format!("section {:?} is not where it must be", section.name)))?;
        let mut sum = Rolling::new();
        let part = named(&section.name);
        source.stream(&part, begin, section.len, |piece| {
            sum.update(piece);
            Ok(())
        })?;
        if sum.digest() != section.checksum {
            return Err(source.corrupt(part, "wrong checksum"));
        }
    }
    if skip_padding(source, end, footer_at)? != footer_at {
        return Err(source.corrupt(FOOTER, "bytes that belong to no section"));
    }
    Ok(())
}

/// The next aligned offset, after seeing that the bytes up to there are zero.
fn skip_padding(source: &Source<'_>, end: u64, limit: u64) -> Result<u64, Error> {
    let next = align_up(end, ALIGN);
    if next > limit {
        return Err(source.corrupt(FOOTER, "the sections do not fit into the file"));
    }
    let mut padding = [0; ALIGN as usize];
    let padding = &mut padding[..(next - end) as usize];
    source.read("padding", end, padding)?;
    if padding.iter().any(|&byte| byte != 0) {
        return Err(source.corrupt("padding", format!("not zero at offset {end}")));
    }
    Ok(next)
}

fn read_index(source: &Source<'_>, trailer: &Trailer, sections: &[SectionInfo]) -> Result<Vec<PageRun>, Error> {
    let corrupt = |detail: String| source.corrupt(INDEX, detail);
    let mut indexes = sections.iter().filter(|section| section.kind == SectionKind::Index);
    let index = match (indexes.next(), indexes.next()) {
        (Some(index), None) if index.name == INDEX_NAME => index,
        _ => return Err(corrupt(format!("there must be one, named {INDEX_NAME:?}"))),
    };
    if index.len % RUN_LEN as u64 != 0 {
        return Err(corrupt("its length is not a whole number of records".to_owned()));
    }
    let data_end = DATA_START + trailer.data_len;
    // Grows as records prove good: a sparse file of zeros must not make us allocate what its length promises.
    let mut runs: Vec<PageRun> = Vec::new();
    source.stream(INDEX, index.offset, index.len, |piece| {
        for raw in piece.chunks_exact(RUN_LEN) {
            let run = PageRun::decode(raw);
            let number = runs.len();
            run.check(data_end)
                .map_err(|detail| corrupt(format!("record {number}: {detail}")))?;
            let ordered = runs
                .last()
                .is_none_or(|last| last.space < run.space || last.space == run.space && last.end() <= run.start);
            if !ordered {
                return Err(corrupt(format!(
                    "record {number}: overlaps the one before it or is out of order"
                )));
            }
            runs.push(run);
        }
        Ok(())
    })?;
    Ok(runs)
}
