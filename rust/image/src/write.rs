//! Writing: data streams by once and is hashed on the way; metadata, index and footer follow at commit.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::chain;
use crate::checksum::{self, BlockTable, Rolling};
use crate::codec::Compression;
use crate::error::Error;
use crate::frames::Frame;
use crate::header::{HeaderInfo, PARENT, Parent};
use crate::layout::{
    ALIGN, BLOCK_SIZE, BlobRef, DATA_START, FILE_NAME, FRAMES_NAME, INDEX_NAME, LINK_SHIFT, MAX_CHAIN, MAX_DATA,
    MAX_JSON, MAX_RUNS, MAX_SECTIONS, PAGE, PageRun, SectionInfo, SectionKind, TRAILER_DIGESTED, Trailer, align_up,
    is_name,
};
use crate::packer::{Gone, Packed, Packer};
use crate::place::{Naming, Place};
use crate::read::Reader;
use crate::share::{self, Share};
use crate::writeback::Writeback;

/// Pieces up to this size are gathered into larger writes; what is larger goes to the kernel from where it lies.
const GATHER: usize = 64 << 10;
const BUFFER: usize = 1 << 20;

/// A complete image, on disk under its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The file.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Names its content: 32 hexadecimal digits, the same that [`crate::Reader::digest`] returns.
    pub digest: String,
}

/// Writes an image. Nothing is visible until [`Writer::commit`] succeeds; dropping it before leaves the disk as it was found.
///
/// Data is not held in memory: at most one buffer, the metadata sections, 32 bytes for each page run and 8 for each MiB.
#[derive(Debug)]
pub struct Writer {
    place: Place,
    writeback: Writeback,
    buffer: Vec<u8>,
    /// Offset in the file of the next byte.
    position: u64,
    /// Offset of the next byte of data as callers and readers count: in a compressed image, as if it were not.
    data: u64,
    /// Compresses data on its way to the file.
    packer: Option<Packer>,
    frames: Vec<Frame>,
    blocks: BlockTable,
    info: HeaderInfo,
    /// The header page of `info`.
    header: Vec<u8>,
    /// The page in the file is an older one.
    header_is_new: bool,
    sections: Vec<(String, Vec<u8>)>,
    runs: Vec<PageRun>,
    parent: Option<Arc<Reader>>,
    /// A write failed: what is in the file is not known.
    broken: bool,
}

impl Writer {
    /// Makes `dir` and its parents (mode 0755), claims it for this writer and writes the header.
    ///
    /// # Errors
    /// [`Error::Exists`] if the directory holds a `checkpoint.img`, [`Error::Busy`] if somebody is writing one there or holds a lock on
    /// the directory, [`Error::NotADirectory`], [`Error::Permission`], [`Error::NoSpace`], [`Error::Arch`] if the page size of this
    /// machine is not that of the format. Directories it made are removed again.
    pub fn create(dir: &Path, info: HeaderInfo) -> Result<Writer, Error> {
        Writer::create_with(dir, &info, Naming::Nameless)
    }

    pub(crate) fn create_with(dir: &Path, info: &HeaderInfo, naming: Naming) -> Result<Writer, Error> {
        // Before the directory is touched: what is wrong with it is wrong anywhere.
        let header = info.encode(&dir.join(FILE_NAME))?;
        Writer::begin(Place::claim(dir, naming)?, info.clone(), header, None)
    }

    /// As [`Writer::create`], for an image that goes on from the one in the directory `parent`, a path relative to `dir`.
    ///
    /// The new image names its parent by digest and uuid. It holds the data that is appended, and [`Writer::inherit`] takes pages of the
    /// parent, or of what that goes on from, into its index. A page that is in no run of the new index is not in the new image: what
    /// the parent says of it does not count.
    ///
    /// # Errors
    /// As [`Writer::create`], and as [`Reader::open`] for the parent. [`Error::ParentPath`] if the path is not relative or not UTF-8;
    /// [`Error::ChainTooLong`].
    pub fn create_child(dir: &Path, mut info: HeaderInfo, parent: &Path) -> Result<Writer, Error> {
        let target = dir.join(FILE_NAME);
        let unusable = |detail| Error::ParentPath {
            path: target.clone(),
            parent: parent.to_path_buf(),
            detail,
        };
        let path = parent.to_str().ok_or_else(|| unusable("it is not UTF-8"))?;
        if parent.is_absolute() || path.is_empty() {
            return Err(unusable("it is not relative"));
        }
        // The kernel finds `../x` only from a directory that exists.
        let place = Place::claim(dir, Naming::Nameless)?;
        let reader = Reader::open(&chain::place(&target, path))?;
        if reader.chain().len() >= MAX_CHAIN {
            return Err(Error::ChainTooLong { path: target });
        }
        info.requires.push(PARENT.to_owned());
        info.parent = Some(Parent {
            path: path.to_owned(),
            digest: reader.digest(),
            uuid: reader.header().uuid.clone(),
        });
        let header = info.encode(&target)?;
        Writer::begin(place, info, header, Some(Arc::new(reader)))
    }

    fn begin(place: Place, info: HeaderInfo, header: Vec<u8>, parent: Option<Arc<Reader>>) -> Result<Writer, Error> {
        let mut writer = Writer {
            place,
            writeback: Writeback::new(),
            buffer: Vec::with_capacity(BUFFER),
            position: 0,
            data: DATA_START,
            packer: None,
            frames: Vec::new(),
            blocks: BlockTable::new(),
            info,
            header: Vec::new(),
            header_is_new: false,
            sections: Vec::new(),
            runs: Vec::new(),
            parent,
            broken: false,
        };
        writer.put(&header)?;
        writer.header = header;
        Ok(writer)
    }

    /// Compresses all data, with threads of its own. To be called before any is appended.
    ///
    /// # Errors
    /// [`Error::Misuse`] if there is data already; [`Error::Io`] if there is no memory for it.
    pub fn compress(&mut self, how: Compression) -> Result<(), Error> {
        let Some(codec) = how.codec() else { return Ok(()) };
        let path = self.place.target();
        if self.packer.is_some() || self.data != DATA_START || self.buffer.len() != self.header.len() {
            return Err(Error::misuse(path, "data", "compressed too late"));
        }
        self.info.requires.push(codec.word().to_owned());
        // It waits in the buffer still.
        self.header = self.info.encode(path)?;
        self.buffer.clone_from(&self.header);
        let packer = Packer::new(how);
        let no_memory = || Error::io(path, "compress the data of", io::ErrorKind::OutOfMemory.into());
        self.packer = Some(packer.ok_or_else(no_memory)?);
        Ok(())
    }

    /// The image that this one goes on from.
    pub fn parent(&self) -> Option<&Arc<Reader>> {
        self.parent.as_ref()
    }

    /// Adds to the index that the `pages` pages of the space `to.0` from address `to.1` on are those that the parent has in the space
    /// `from.0` from address `from.1` on. Zero pages stay zero pages, and what the parent does not hold is left out here too. Returns
    /// how many pages with data that are.
    ///
    /// # Errors
    /// [`Error::Misuse`] if there is no parent, or an address is not that of a page.
    pub fn inherit(&mut self, from: (u32, u64), to: (u32, u64), pages: u64) -> Result<u64, Error> {
        let target = self.place.target().to_path_buf();
        let misuse = |detail: &str| Error::misuse(&target, "page index", detail);
        let parent = self.parent.clone().ok_or_else(|| misuse("there is no parent"))?;
        if from.1 % PAGE != 0 || to.1 % PAGE != 0 {
            return Err(misuse("inherited from or to an address that is not that of a page"));
        }
        let mut taken = 0;
        for run in parent.runs_in(from.0, from.1, pages) {
            let start = to.1.checked_add(run.start - from.1);
            let start = start.ok_or_else(|| misuse("inherited to addresses that do not exist"))?;
            if !run.is_zero() {
                taken += run.pages;
            }
            self.push_run(PageRun {
                space: to.0,
                start,
                offset: if run.is_zero() {
                    0
                } else {
                    run.offset + (1 << LINK_SHIFT)
                },
                ..run
            });
        }
        Ok(taken)
    }

    /// Appends whole pages and returns the file offset of the first, for a [`PageRun`].
    ///
    /// # Errors
    /// [`Error::Misuse`] if the length is not a multiple of the page size; [`Error::NoSpace`], [`Error::Io`].
    pub fn append_pages(&mut self, data: &[u8]) -> Result<u64, Error> {
        if data.len() as u64 % PAGE != 0 {
            return Err(Error::misuse(
                self.place.target(),
                "data",
                format!("{} bytes are not whole pages", data.len()),
            ));
        }
        self.pad_data(PAGE)?;
        let offset = self.data;
        self.put_data(data)?;
        Ok(offset)
    }

    /// Appends a blob.
    ///
    /// # Errors
    /// [`Error::NoSpace`], [`Error::Io`].
    pub fn append_blob(&mut self, data: &[u8]) -> Result<BlobRef, Error> {
        self.pad_data(ALIGN)?;
        let offset = self.data;
        self.put_data(data)?;
        Ok(BlobRef {
            offset,
            len: data.len() as u64,
        })
    }

    /// Appends as a blob all that `reader` yields, without holding it in memory. `len_hint`, where known, only sizes the buffer.
    ///
    /// # Errors
    /// [`Error::Source`] if `reader` fails: the writer remains usable, the bytes read so far stay in the file unused.
    /// [`Error::NoSpace`], [`Error::Io`].
    pub fn append_blob_from(&mut self, reader: &mut dyn Read, len_hint: Option<u64>) -> Result<BlobRef, Error> {
        self.pad_data(ALIGN)?;
        let offset = self.data;
        // One byte more than expected, so that the end is seen without another round.
        let size = len_hint.map_or(BLOCK_SIZE, |len| {
            len.saturating_add(1).clamp(4096, BLOCK_SIZE as u64) as usize
        });
        let mut chunk = vec![0; size];
        loop {
            match reader.read(&mut chunk) {
                Ok(0) => {
                    return Ok(BlobRef {
                        offset,
                        len: self.data - offset,
                    });
                }
                Ok(count) => self.put_data(&chunk[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Source {
                        path: self.place.target().to_path_buf(),
                        source,
                    });
                }
            }
        }
    }

    /// Adds a record to the page index. Order does not matter: commit sorts the records and joins adjacent ones.
    pub fn push_run(&mut self, run: PageRun) {
        if !self.runs.last_mut().is_some_and(|last| last.absorb(&run)) {
            self.runs.push(run);
        }
    }

    /// Gives pages that are in the image already to other spaces as well. To be called when the runs of every space that is shared
    /// from are there. `shares` of one space follow each other; a space that has got its own may be shared from by what follows.
    pub fn share(&mut self, shares: &[Share]) {
        for run in share::runs(&self.runs, shares) {
            self.push_run(run);
        }
    }

    /// Adds a JSON section, to be written at commit.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the name is taken, reserved or not one, or if the value cannot be JSON; [`Error::TooLarge`].
    pub fn add_section(&mut self, name: &str, json: &impl Serialize) -> Result<(), Error> {
        let json = serde_json::to_vec(json)
            .map_err(|error| Error::misuse(self.place.target(), format!("section {name:?}"), error.to_string()))?;
        self.add_raw_section(name, json)
    }

    /// As [`Writer::add_section`], of bytes that are JSON.
    pub(crate) fn add_raw_section(&mut self, name: &str, json: Vec<u8>) -> Result<(), Error> {
        let path = self.place.target();
        let misuse = |detail: String| Error::misuse(path, format!("section {name:?}"), detail);
        if !is_name(name) {
            return Err(misuse("a name is 1 to 32 of a-z 0-9 . _ -".to_owned()));
        }
        if [INDEX_NAME, FRAMES_NAME].contains(&name) || self.sections.iter().any(|(taken, _)| taken == name) {
            return Err(misuse("the name is taken".to_owned()));
        }
        let too_large = |what, count, limit| Error::TooLarge {
            path: path.to_path_buf(),
            what,
            count,
            limit,
        };
        if json.len() as u64 > MAX_JSON {
            return Err(too_large(
                "bytes of metadata in one section",
                json.len() as u64,
                MAX_JSON,
            ));
        }
        // Others are the index and, in a compressed image, the frame table.
        let count = self.sections.len() as u64 + 2 + u64::from(self.packer.is_some());
        if count > u64::from(MAX_SECTIONS) {
            return Err(too_large("sections", count, u64::from(MAX_SECTIONS)));
        }
        self.sections.push((name.to_owned(), json));
        Ok(())
    }

    /// Demands an ability of every reader of this image, for something that turned out to be in it.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the word is not a short printable one, or is that of an image with a parent.
    pub fn require(&mut self, word: &str) -> Result<(), Error> {
        if !self.info.requires.iter().any(|known| known == word) {
            self.info.requires.push(word.to_owned());
            self.header = self.info.encode(self.place.target())?;
            self.header_is_new = true;
        }
        Ok(())
    }

    /// Bytes of header and data so far, as they are in the file; compressed data arrives there a little later.
    pub fn bytes(&self) -> u64 {
        self.position
    }

    /// Writes what is left, waits until all of it is on disk, and gives the file its name.
    ///
    /// # Errors
    /// [`Error::Exists`] if somebody else put a `checkpoint.img` there meanwhile, which stays as it is; [`Error::Misuse`] if a page run
    /// is wrong or overlaps another; [`Error::TooLarge`], [`Error::NoSpace`], [`Error::Permission`], [`Error::Io`]. After an error there
    /// is no image.
    pub fn commit(mut self) -> Result<Committed, Error> {
        self.check_runs(self.data)?;
        self.finish_data()?;
        let data_end = self.position;
        let mut table = Vec::with_capacity(self.sections.len() + 1);
        for (name, json) in std::mem::take(&mut self.sections) {
            self.pad(ALIGN)?;
            table.push(SectionInfo {
                name,
                kind: SectionKind::Json,
                offset: self.position,
                len: json.len() as u64,
                flags: 0,
                checksum: checksum::of(&json),
            });
            self.put(&json)?;
        }
        if self.packer.take().is_some() {
            let records: Vec<_> = std::mem::take(&mut self.frames).iter().map(Frame::encode).collect();
            table.push(self.put_records(FRAMES_NAME, SectionKind::Frames, records)?);
        }
        let records: Vec<_> = std::mem::take(&mut self.runs);
        table.push(self.put_records(INDEX_NAME, SectionKind::Index, records.iter().map(PageRun::encode))?);
        self.pad(ALIGN)?;
        let digest = self.put_footer(data_end - DATA_START, &table)?;
        self.flush()?;
        self.writeback.stop();
        let path = self.place.target();
        if self.header_is_new {
            let written = self.place.file().write_all_at(&self.header, 0);
            written.map_err(|error| Error::io(path, "write", error))?;
        }
        self.place
            .file()
            .sync_all()
            .map_err(|error| Error::io(path, "write to disk", error))?;
        Ok(Committed {
            bytes: self.position,
            digest: format!("{digest:032x}"),
            path: self.place.publish()?,
        })
    }

    fn check_runs(&mut self, data_end: u64) -> Result<(), Error> {
        self.runs.sort_unstable();
        self.runs.dedup_by(|next, last| last.absorb(next));
        let path = self.place.target();
        let mut ends = vec![data_end];
        ends.extend(self.parent.iter().flat_map(|parent| parent.data_ends()));
        if self.runs.len() as u64 > MAX_RUNS {
            let count = self.runs.len() as u64;
            return Err(Error::TooLarge {
                path: path.to_path_buf(),
                what: "page runs",
                count,
                limit: MAX_RUNS,
            });
        }
        let mut previous: Option<&PageRun> = None;
        for run in &self.runs {
            let overlap = previous.is_some_and(|last| last.space == run.space && last.end() > run.start);
            let checked = if overlap {
                Err("overlaps the run before it")
            } else {
                run.check().and_then(|()| run.check_place(&ends))
            };
            checked.map_err(|detail| Error::misuse(path, "page index", format!("{detail}: {run:?}")))?;
            previous = Some(run);
        }
        Ok(())
    }

    fn put_records<const N: usize>(
        &mut self,
        name: &str,
        kind: SectionKind,
        records: impl IntoIterator<Item = [u8; N]>,
    ) -> Result<SectionInfo, Error> {
        self.pad(ALIGN)?;
        let offset = self.position;
        let mut sum = Rolling::new();
        for raw in records {
            sum.update(&raw);
            self.put(&raw)?;
        }
        Ok(SectionInfo {
            name: name.to_owned(),
            kind,
            offset,
            len: self.position - offset,
            flags: 0,
            checksum: sum.digest(),
        })
    }

    fn put_footer(&mut self, data_len: u64, table: &[SectionInfo]) -> Result<u128, Error> {
        let blocks = std::mem::replace(&mut self.blocks, BlockTable::new()).finish();
        let mut trailer = Trailer {
            data_len,
            file_len: 0,
            block_count: blocks.len() as u64,
            section_count: table.len() as u32,
            block_size: BLOCK_SIZE as u32,
            digest: 0,
        };
        trailer.file_len = self.position + trailer.footer_len().unwrap_or(0);
        let mut tables: Vec<u8> = table.iter().flat_map(SectionInfo::encode).collect();
        tables.extend(blocks.iter().flat_map(|sum| sum.to_le_bytes()));
        trailer.digest = digest(&self.header, &tables, &trailer);
        self.put(&tables)?;
        self.put(&trailer.encode())?;
        Ok(trailer.digest)
    }

    fn pad_data(&mut self, align: u64) -> Result<(), Error> {
        let missing = align_up(self.data, align) - self.data;
        self.put_data(&[0; PAGE as usize][..missing as usize])
    }

    fn pad(&mut self, align: u64) -> Result<(), Error> {
        let missing = align_up(self.position, align) - self.position;
        self.put(&[0; PAGE as usize][..missing as usize])
    }

    /// Writes bytes of the data area, or has them compressed.
    pub(crate) fn put_data(&mut self, mut data: &[u8]) -> Result<(), Error> {
        let len = self.data - DATA_START + data.len() as u64;
        if len > MAX_DATA {
            let path = self.place.target().to_path_buf();
            return Err(Error::TooLarge {
                path,
                what: "bytes of data",
                count: len,
                limit: MAX_DATA,
            });
        }
        self.data += data.len() as u64;
        if self.packer.is_none() {
            return self.put_stored(data);
        }
        while let Some(packer) = self.packer.as_mut().filter(|_| !data.is_empty()) {
            let taken = packer.take(data);
            data = &data[taken..];
            let ready = packer.ready();
            self.put_packed(ready)?;
        }
        Ok(())
    }

    /// Has the last blocks compressed and written.
    fn finish_data(&mut self) -> Result<(), Error> {
        while let Some(packer) = &mut self.packer {
            let ready = packer.drain();
            if !self.put_packed(ready)? {
                break;
            }
        }
        Ok(())
    }

    /// Writes a frame, if there is one.
    fn put_packed(&mut self, ready: Result<Option<Packed>, Gone>) -> Result<bool, Error> {
        let gone = |Gone| Error::misuse(self.place.target(), "data", "a thread that compresses is gone");
        let Some(done) = ready.map_err(gone)? else {
            return Ok(false);
        };
        self.frames.push(Frame {
            offset: self.position,
            stored: done.stored().len() as u32,
            raw: done.raw_len,
            stored_sum: done.stored_sum,
            raw_sum: done.raw_sum,
        });
        self.put_stored(done.stored())?;
        if let Some(packer) = &mut self.packer {
            packer.recycle(done);
        }
        Ok(true)
    }

    /// Writes bytes as they are to be in the file: hashed block by block, each piece while it is still in the cache.
    fn put_stored(&mut self, mut data: &[u8]) -> Result<(), Error> {
        while !data.is_empty() {
            let (piece, rest) = data.split_at(data.len().min(self.blocks.room()));
            self.blocks.update(piece);
            self.put(piece)?;
            data = rest;
        }
        Ok(())
    }

    fn put(&mut self, data: &[u8]) -> Result<(), Error> {
        if self.buffer.len() + data.len() > BUFFER || data.len() > GATHER {
            self.flush()?;
        }
        if data.len() > GATHER {
            self.write_through(data)?;
        } else {
            self.buffer.extend_from_slice(data);
        }
        self.position += data.len() as u64;
        let written = self.position - self.buffer.len() as u64;
        self.writeback.reached(self.place.file(), written);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = self.write_through(&buffer);
        buffer.clear();
        self.buffer = buffer;
        written
    }

    fn write_through(&mut self, data: &[u8]) -> Result<(), Error> {
        let path = self.place.target();
        if self.broken {
            return Err(Error::misuse(path, "data", "used after a failed write"));
        }
        let mut file: &File = self.place.file();
        let written = file.write_all(data).map_err(|error| Error::io(path, "write", error));
        self.broken = written.is_err();
        written
    }
}

/// The total digest: over the header page, the two tables, and the trailer as far as it is not the digest itself.
pub(crate) fn digest(header: &[u8], tables: &[u8], trailer: &Trailer) -> u128 {
    let mut total = Rolling::new();
    total.update(header);
    total.update(tables);
    total.update(&trailer.encode()[..TRAILER_DIGESTED]);
    total.digest128()
}
