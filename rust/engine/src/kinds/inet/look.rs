//! Reading TCP connections from a process of its own. A connection is in repair for a few microseconds meanwhile, and
//! calls on it would fail: were it the tracer that reads, its death would both leave that so and let the programs run.
//! This process finishes what it began whatever happens to the tracer; what happens to it, the tracer undoes.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use torpor_sys::socket::tcp;
use torpor_sys::socket::tcp::{Before, Snapshot};
use torpor_sys::{Pid, fd, fork};

use crate::error::{About, Error, Result};

/// Reads all of them, as close to one moment as can be. `init` is for errors.
pub(super) fn look(init: Pid, sockets: &[&OwnedFd]) -> Result<Vec<Snapshot>> {
    const OBJECT: &str = "TCP connections";
    let before: Vec<Before> = sockets
        .iter()
        .map(Before::of)
        .collect::<torpor_sys::Result<_>>()
        .about(init, OBJECT)?;
    let (reader, writer) = fd::pipe().about(init, OBJECT)?;
    let mut keep: Vec<i32> = sockets.iter().map(|s| s.as_raw_fd()).collect();
    keep.push(writer.as_raw_fd());
    let child = fork::fork(|| {
        let free = fork::become_independent(c"torpor-look", &keep).is_ok();
        let answer = free.then(|| encode(&read_all(sockets, &before)));
        let done = answer.is_some_and(|bytes| std::fs::File::from(writer).write_all(&bytes).is_ok());
        i32::from(!done)
    })
    .about(init, OBJECT)?;
    // Ours is a copy; the child's is what the reader waits for.
    let mut bytes = Vec::new();
    let read = std::fs::File::from(reader).read_to_end(&mut bytes);
    let ended = fork::wait_child(child).about(init, OBJECT)?;
    let answer = read.ok().filter(|_| ended == 0).and_then(|_| decode(&bytes));
    let Some(answer) = answer else {
        for (socket, before) in sockets.iter().zip(before) {
            before.undo(socket).about(init, OBJECT)?;
        }
        let how = "while it read connections".into();
        return Err(torpor_sys::Error::Died { pid: child, how }).about(init, OBJECT);
    };
    answer.map_err(|why| Error::unsupported(init, OBJECT, why, ""))
}

type Answer = std::result::Result<Vec<Snapshot>, String>;

fn read_all(sockets: &[&OwnedFd], before: &[Before]) -> Answer {
    let one = |(socket, before): (&&OwnedFd, &Before)| tcp::snapshot(socket, *before).map_err(|e| e.to_string());
    sockets.iter().zip(before).map(one).collect()
}

/// The length of a description, the description, and all bytes of all connections.
fn encode(answer: &Answer) -> Vec<u8> {
    let lengths = |s: &Snapshot| (s.outgoing.len(), s.incoming.len());
    let lengths: Vec<_> = answer.iter().flatten().map(lengths).collect();
    let head = serde_json::to_vec(&(answer, lengths)).unwrap_or_default();
    let mut bytes = (head.len() as u64).to_le_bytes().to_vec();
    bytes.extend(head);
    for snapshot in answer.iter().flatten() {
        bytes.extend(&snapshot.outgoing);
        bytes.extend(&snapshot.incoming);
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<Answer> {
    let (len, rest) = bytes.split_first_chunk()?;
    let (head, mut rest) = rest.split_at_checked(u64::from_le_bytes(*len) as usize)?;
    let (mut answer, lengths): (Answer, Vec<(usize, usize)>) = serde_json::from_slice(head).ok()?;
    let mut take = |len| {
        let (part, more) = rest.split_at_checked(len)?;
        rest = more;
        Some(part.to_vec())
    };
    for (snapshot, (outgoing, incoming)) in answer.iter_mut().flatten().zip(lengths) {
        snapshot.outgoing = take(outgoing)?;
        snapshot.incoming = take(incoming)?;
    }
    Some(answer)
}
