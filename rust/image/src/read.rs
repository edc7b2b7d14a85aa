//! Reading. Nothing in a file is believed before it is checked: lengths against the file, bytes against their checksum, records against
//! the rules of the format. A damaged or hostile file gives an [`Error`], never a panic and never a large allocation.
//!
//! An image may be the last of a chain. What it holds itself and what its ancestors hold is read in the same way: the upper bits of an
//! offset say in which of them it is.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::chain;
use crate::checksum;
use crate::codec::Codec;
use crate::error::Error;
use crate::header::HeaderInfo;
use crate::layout::{
    BlobRef, INDEX_NAME, LINK_SHIFT, MAX_JSON, PAGE, PageRun, RUN_LEN, SectionInfo, SectionKind, link_of,
};
use crate::link::{Link, named};

/// [`Reader::blob`] refuses larger blobs; [`Reader::blob_reader`] does not hold them in memory.
pub const MAX_BLOB_IN_MEMORY: u64 = 64 << 20;

const INDEX: &str = "page index";

/// An image that was opened and, but for its data blocks, verified. So were its ancestors, if it has any.
#[derive(Debug)]
pub struct Reader {
    /// The image itself, its parent, and so on.
    chain: Vec<Link>,
    runs: Vec<PageRun>,
}

impl Reader {
    /// Opens a `checkpoint.img`, or the one in a directory, and all that it goes on from, and checks all of it except the data blocks,
    /// which [`Reader::verify`] reads.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Permission`], [`Error::Corrupt`]; [`Error::Version`] and [`Error::Feature`] if a newer torpor is
    /// needed; [`Error::Arch`] if it was made on another kind of machine; [`Error::ParentMissing`], [`Error::ParentChanged`] and
    /// [`Error::ChainTooLong`] if what it goes on from is not there as it was.
    pub fn open(path: &Path) -> Result<Reader, Error> {
        let reader = Reader::open_foreign(path)?;
        reader.header().check_host(reader.path())?;
        Ok(reader)
    }

    /// As [`Reader::open`], but accepts images of other machines: to look at, not to restore.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn open_foreign(path: &Path) -> Result<Reader, Error> {
        let chain = chain::open(path)?;
        let ends: Vec<u64> = chain.iter().map(Link::data_end).collect();
        let runs = read_index(&chain[0], &ends)?;
        Ok(Reader { chain, runs })
    }

    /// Reads the header page alone: quick, and works for images of other machines and without their parents.
    ///
    /// # Errors
    /// As [`Reader::open`], for what the header tells.
    pub fn peek(path: &Path) -> Result<HeaderInfo, Error> {
        Link::peek(path)
    }

    /// What the header says.
    pub fn header(&self) -> &HeaderInfo {
        self.head().info()
    }

    /// Major and minor format version.
    pub fn version(&self) -> (u16, u16) {
        (crate::MAJOR, self.head().minor())
    }

    /// Names the content: 32 hexadecimal digits. Against accidents, not against forgery.
    pub fn digest(&self) -> String {
        self.head().digest()
    }

    /// The image itself, its parent, and so on.
    pub fn chain(&self) -> impl ExactSizeIterator<Item = Member<'_>> {
        self.chain.iter().map(Member)
    }

    /// All sections in file order, also those of a newer version.
    pub fn sections(&self) -> impl Iterator<Item = &SectionInfo> {
        self.head().sections().iter()
    }

    /// Reads a JSON section. Its checksum is compared again, as the file may have changed since it was opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if there is no such section or its content is not what `T` wants.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let bytes = self.section_bytes(name)?;
        serde_json::from_slice(&bytes).map_err(|error| self.head().corrupt(named(name), error.to_string()))
    }

    /// The bytes of a section, for whoever wants to show it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if there is no such section, or it is larger than a JSON section may be.
    pub fn section_bytes(&self, name: &str) -> Result<Vec<u8>, Error> {
        let head = self.head();
        let section = self.sections().find(|section| section.name == name);
        let section = section.ok_or_else(|| head.corrupt(named(name), "it is missing"))?;
        if section.len > MAX_JSON {
            return Err(head.corrupt(named(name), format!("{} bytes are more than {MAX_JSON}", section.len)));
        }
        let mut bytes = vec![0; section.len as usize];
        head.source().read(&named(name), section.offset, &mut bytes)?;
        if checksum::of(&bytes) != section.checksum {
            return Err(head.corrupt(named(name), "wrong checksum"));
        }
        Ok(bytes)
    }

    /// The page index, with what ancestors hold: sorted by space and start, without overlap.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// The part of the page index that is about one space.
    pub fn runs_of(&self, space: u32) -> &[PageRun] {
        let from = self.runs.partition_point(|run| run.space < space);
        let len = self.runs[from..].partition_point(|run| run.space == space);
        &self.runs[from..from + len]
    }

    /// What the index says of the `pages` pages of `space` from `start` on: runs, cut at both ends. Pages in none of them are not in
    /// the image.
    pub fn runs_in(&self, space: u32, start: u64, pages: u64) -> impl Iterator<Item = PageRun> {
        let end = start.saturating_add(pages.saturating_mul(PAGE));
        let runs = self.runs_of(space);
        let first = runs.partition_point(|run| run.end() <= start);
        let touched = runs[first..].iter().take_while(move |run| run.start < end);
        touched.map(move |run| run.part(start, end))
    }

    /// Reads every data block of the whole chain, unpacks it where it is compressed, and compares its checksums, with up to four
    /// threads.
    ///
    /// # Errors
    /// [`Error::Corrupt`] with the offset of the first block that is wrong; [`Error::Io`].
    pub fn verify(&self) -> Result<(), Error> {
        self.chain.iter().try_for_each(Link::verify)
    }

    /// As [`Reader::verify`], without unpacking: for whoever reads it all through [`Reader::unpack`] or [`Reader::read_block`]
    /// afterwards, which check what they unpack.
    ///
    /// # Errors
    /// As [`Reader::verify`].
    pub fn verify_stored(&self, checked: impl Fn(u64) + Sync) -> Result<(), Error> {
        self.chain.iter().try_for_each(|link| link.verify_stored(&checked))
    }

    /// How many bytes [`Reader::verify_stored`] checks.
    pub fn stored_len(&self) -> u64 {
        self.chain.iter().map(Link::stored_len).sum()
    }

    /// Reads the checksummed block that holds the byte at `offset`, of this image or of an ancestor, and checks it: for whoever cannot
    /// wait for [`Reader::verify`]. Returns the offset of its first byte; `buffer` then holds the block and nothing else.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is not what was written, or no such block exists; [`Error::Io`].
    pub fn read_block(&self, offset: u64, buffer: &mut Vec<u8>) -> Result<u64, Error> {
        let (link, number, at) = self.link(offset)?;
        Ok(link.read_block(at, buffer)? | (number as u64) << LINK_SHIFT)
    }

    /// Reads data of the page area. What [`Reader::verify`] found good may be believed.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if that is not in the data area; [`Error::Io`].
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let (link, _, at) = self.link(offset)?;
        link.read_at(at, buf)
    }

    /// The file, and the offset in it, where the bytes at `offset` are: for whoever maps it or reads it in another way. The rest of the
    /// data area follows. `None` if they are compressed: [`Reader::unpack`] gives them.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if there is no such image in the chain.
    pub fn stored(&self, offset: u64) -> Result<Option<(&File, u64)>, Error> {
        let (link, _, at) = self.link(offset)?;
        Ok((!link.is_compressed()).then(|| (link.file(), at)))
    }

    /// Hands the `len` bytes from `offset` on to `take`, checked, in pieces of at most 1 MiB. The last few blocks are kept, so that small
    /// pieces of the same block cost little.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when they are not what was written, or not in the data area; [`Error::Io`]; what `take` returns.
    pub fn unpack<E: From<Error>>(
        &self,
        offset: u64,
        len: u64,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (link, _, at) = self.link(offset)?;
        link.check_range(at, len)?;
        let mut done = 0;
        while done < len {
            let (begin, block) = link.unpacked(at + done)?;
            let from = (at + done - begin) as usize;
            let count = (len - done).min((block.len() - from) as u64);
            take(&block[from..from + count as usize])?;
            done += count;
        }
        Ok(())
    }

    /// Where the first page is among what this image holds itself; its end when it holds none. Blobs lie before it if they were
    /// written first.
    pub fn first_page(&self) -> u64 {
        let own = self.runs.iter().filter(|run| !run.is_zero() && run.link() == 0);
        own.map(|run| run.offset).min().unwrap_or(self.head().data_end())
    }

    /// Reads a blob of at most [`MAX_BLOB_IN_MEMORY`] bytes.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if that is not in the data area or larger; [`Error::Io`].
    pub fn blob(&self, blob: BlobRef) -> Result<Vec<u8>, Error> {
        self.head().check_range(blob.offset, blob.len)?;
        if blob.len > MAX_BLOB_IN_MEMORY {
            return Err(self.head().corrupt(
                "data",
                format!("a blob of {} bytes is more than {MAX_BLOB_IN_MEMORY}", blob.len),
            ));
        }
        let mut bytes = vec![0; blob.len as usize];
        self.head().read_at(blob.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a blob of any size, piece by piece.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if that is not in the data area.
    pub fn blob_reader(&self, blob: BlobRef) -> Result<BlobReader<'_>, Error> {
        self.head().check_range(blob.offset, blob.len)?;
        Ok(BlobReader {
            link: self.head(),
            offset: blob.offset,
            left: blob.len,
        })
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        self.head().path()
    }

    /// Length of the file.
    #[expect(clippy::len_without_is_empty, reason = "an image is never empty")]
    pub fn len(&self) -> u64 {
        self.head().len()
    }

    /// Length of the data area, unpacked.
    pub fn data_len(&self) -> u64 {
        self.head().data_len()
    }

    /// Where the data areas of the chain end.
    pub(crate) fn data_ends(&self) -> impl Iterator<Item = u64> {
        self.chain.iter().map(Link::data_end)
    }

    fn head(&self) -> &Link {
        // A chain has at least the image itself.
        &self.chain[0]
    }

    fn link(&self, offset: u64) -> Result<(&Link, usize, u64), Error> {
        let (number, at) = link_of(offset);
        let link = self.chain.get(number);
        let link = link.ok_or_else(|| self.head().corrupt("data", format!("no data at offset {offset:#x}")))?;
        Ok((link, number, at))
    }
}

/// One image of a chain.
#[derive(Debug)]
pub struct Member<'a>(&'a Link);

impl Member<'_> {
    /// The path of the file.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        self.0.len()
    }

    /// Names its content.
    pub fn digest(&self) -> String {
        self.0.digest()
    }

    /// Length of its data, unpacked.
    pub fn data_bytes(&self) -> u64 {
        self.0.data_len()
    }

    /// How its data is compressed: `none`, or the name of the codec.
    pub fn compression(&self) -> &'static str {
        self.0.codec().map_or("none", Codec::word)
    }

    /// What its header says.
    pub fn header(&self) -> &HeaderInfo {
        self.0.info()
    }
}

/// The bytes of one blob.
#[derive(Debug)]
pub struct BlobReader<'a> {
    link: &'a Link,
    offset: u64,
    left: u64,
}

impl Read for BlobReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let part = &mut buf[..want];
        self.link.read_at(self.offset, part).map_err(|error| match error {
            Error::Io { source, .. } => source,
            // The range was checked: only a file that became shorter is left.
            other => io::Error::new(io::ErrorKind::UnexpectedEof, other),
        })?;
        self.offset += want as u64;
        self.left -= want as u64;
        Ok(want)
    }
}

/// Reads the page index of the last of a chain whose data areas end at `ends`.
fn read_index(head: &Link, ends: &[u64]) -> Result<Vec<PageRun>, Error> {
    let corrupt = |detail: String| head.corrupt(INDEX, detail);
    let mut indexes = head
        .sections()
        .iter()
        .filter(|section| section.kind == SectionKind::Index);
    let index = match (indexes.next(), indexes.next()) {
        (Some(index), None) if index.name == INDEX_NAME => index,
        _ => return Err(corrupt(format!("there must be one, named {INDEX_NAME:?}"))),
    };
    if index.len % RUN_LEN as u64 != 0 {
        return Err(corrupt("its length is not a whole number of records".to_owned()));
    }
    // Grows as records prove good: a sparse file of zeros must not make us allocate what its length promises.
    let mut runs: Vec<PageRun> = Vec::new();
    head.source().stream(INDEX, index.offset, index.len, |piece| {
        for raw in piece.chunks_exact(RUN_LEN) {
            let run = PageRun::decode(raw);
            let number = runs.len();
            run.check()
                .and_then(|()| run.check_place(ends))
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
