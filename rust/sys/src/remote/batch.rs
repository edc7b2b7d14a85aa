//! A table of system calls for the stub: `{nr, args[6], flags}` each 64 bytes, and the data they point to.

use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::{Pid, RemoteAddr};

pub(super) const RECORD: usize = 64;
/// Flag of a record: a failure ends the batch.
const MUST: u64 = 1 << 6;

/// A piece of the data area, by offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    offset: usize,
    len: usize,
}

impl Data {
    /// The part that begins `by` bytes further on.
    #[must_use]
    pub fn skip(self, by: usize) -> Data {
        Data {
            offset: self.offset + by,
            len: self.len.saturating_sub(by),
        }
    }
}

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// A number.
    Value(u64),
    /// The address of a piece of data.
    Address(Data),
    /// The 64-bit word found there when the call is made; a 32-bit argument takes its lower half.
    Word(Data),
    /// What the call of this index returned.
    Result(usize),
}

macro_rules! arg_from {
    ($($t:ty),*) => { $(impl From<$t> for Arg {
        #[allow(clippy::cast_lossless, trivial_numeric_casts)]
        fn from(v: $t) -> Arg { Arg::Value(v as i64 as u64) }
    })* };
}
arg_from!(i32, u32, i64, usize);

impl From<u64> for Arg {
    fn from(v: u64) -> Arg {
        Arg::Value(v)
    }
}

impl From<Data> for Arg {
    fn from(d: Data) -> Arg {
        Arg::Address(d)
    }
}

#[derive(Debug)]
struct Call {
    what: String,
    nr: i64,
    args: [Arg; 6],
    must: bool,
}

/// Calls to be run one after another in one stop.
#[derive(Debug, Default)]
pub struct Batch {
    calls: Vec<Call>,
    data: Vec<u8>,
    pointers: Vec<(usize, usize)>,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Batch {
        Batch::default()
    }

    /// True when it holds no call.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// How many bytes it needs in the process.
    pub fn size(&self) -> usize {
        self.calls.len() * RECORD + self.data.len() + 16
    }

    /// Puts bytes into the data area, aligned to 16.
    pub fn data(&mut self, bytes: &[u8]) -> Data {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let offset = self.data.len();
        self.data.extend_from_slice(bytes);
        Data {
            offset,
            len: bytes.len(),
        }
    }

    /// Puts a string into the data area, with its NUL.
    pub fn string(&mut self, text: &str) -> Data {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.data(&bytes)
    }

    /// Room for a result of `len` bytes, zeroed.
    pub fn room(&mut self, len: usize) -> Data {
        self.data(&vec![0; len])
    }

    /// Makes the 64-bit word at `word` the address of `target` (pointers inside structs).
    pub fn point(&mut self, word: Data, target: Data) {
        self.pointers.push((word.offset, target.offset));
    }

    /// Adds a call that must succeed: the batch ends when it fails. `what` says in words what it is for.
    pub fn must<const N: usize>(&mut self, what: impl Into<String>, nr: i64, args: [Arg; N]) -> usize {
        self.push(what.into(), nr, args, true)
    }

    /// Adds a call whose result is looked at afterwards.
    pub fn may<const N: usize>(&mut self, what: impl Into<String>, nr: i64, args: [Arg; N]) -> usize {
        self.push(what.into(), nr, args, false)
    }

    fn push<const N: usize>(&mut self, what: String, nr: i64, args: [Arg; N], must: bool) -> usize {
        let mut all = [Arg::Value(0); 6];
        all[..N].copy_from_slice(&args);
        self.calls.push(Call {
            what,
            nr,
            args: all,
            must,
        });
        self.calls.len() - 1
    }

    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    /// The bytes of the table when it is put at `base`.
    pub(super) fn encode(&self, base: RemoteAddr) -> Vec<u8> {
        let data_base = base + (self.calls.len() * RECORD) as u64;
        let mut out = Vec::with_capacity(self.size());
        for call in &self.calls {
            let mut flags = if call.must { MUST } else { 0 };
            out.extend_from_slice(&call.nr.to_le_bytes());
            for (i, arg) in call.args.iter().enumerate() {
                let word = match *arg {
                    Arg::Value(v) => v,
                    Arg::Address(d) => data_base + d.offset as u64,
                    Arg::Word(d) => {
                        flags |= 1 << i;
                        data_base + d.offset as u64
                    }
                    Arg::Result(n) => {
                        flags |= 1 << i;
                        base + (n * RECORD) as u64
                    }
                };
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.extend_from_slice(&flags.to_le_bytes());
        }
        let at = out.len();
        out.extend_from_slice(&self.data);
        for &(word, target) in &self.pointers {
            let address = data_base + target as u64;
            out[at + word..at + word + 8].copy_from_slice(&address.to_le_bytes());
        }
        // A word read at the end of the data area may reach past it.
        out.extend_from_slice(&[0; 16]);
        out
    }

    /// Reads what the calls returned out of the table after a run.
    pub(super) fn decode(&self, pid: Pid, table: Vec<u8>, ran: usize) -> Result<Results> {
        let word = |i: usize| {
            let b = &table[i * RECORD..i * RECORD + 8];
            i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
        };
        for (i, call) in self.calls.iter().enumerate().take(ran) {
            let ret = word(i);
            if call.must && (-4095..0).contains(&ret) {
                let errno = Errno::from_raw(-ret as i32);
                return Err(Error::Remote {
                    pid,
                    call: call.what.clone(),
                    errno,
                });
            }
        }
        if ran != self.calls.len() {
            let what = self.calls.get(ran).map(|c| c.what.clone()).unwrap_or_default();
            return Err(Error::Unsuitable {
                pid,
                why: format!("the stub stopped before {what}"),
            });
        }
        let returned = (0..ran).map(word).collect();
        Ok(Results {
            pid,
            returned,
            data: table[self.calls.len() * RECORD..].to_vec(),
        })
    }
}

/// What the calls of a batch returned and wrote.
#[derive(Debug)]
pub struct Results {
    pid: Pid,
    returned: Vec<i64>,
    data: Vec<u8>,
}

impl Results {
    /// The raw return value of a call.
    pub fn raw(&self, call: usize) -> i64 {
        self.returned[call]
    }

    /// The return value of a call, or its error.
    pub fn get(&self, call: usize, what: &str) -> Result<u64> {
        match self.returned[call] {
            ret if (-4095..0).contains(&ret) => Err(Error::Remote {
                pid: self.pid,
                call: what.into(),
                errno: Errno::from_raw(-ret as i32),
            }),
            ret => Ok(ret as u64),
        }
    }

    /// The bytes of a piece of data after the run.
    pub fn bytes(&self, data: Data) -> &[u8] {
        &self.data[data.offset..data.offset + data.len]
    }

    /// A 64-bit word of the data.
    pub fn u64(&self, data: Data) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.data[data.offset..data.offset + 8]);
        u64::from_le_bytes(word)
    }

    /// A 32-bit word of the data.
    pub fn i32(&self, data: Data) -> i32 {
        self.u64(data) as u32 as i32
    }
}
