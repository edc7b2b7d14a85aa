//! Moving content: reading goes on while what was read before is written.

use std::sync::mpsc::sync_channel;

use crate::error::{Error, Result};

/// How much is moved at once.
pub(super) const PIECE: usize = 1 << 20;

/// Below this a thread takes longer to start than it saves.
const LARGE: u64 = 4 * PIECE as u64;

/// Fills the given bytes with what is at a place.
pub(super) type Read<'a> = &'a (dyn Fn(u64, &mut [u8]) -> Result<()> + Sync);

/// Moves `len` bytes, piece by piece and in order. Both sides are told how far from the start a piece is.
pub(super) fn copy(
    len: u64,
    buffer: &mut Vec<u8>,
    read: Read<'_>,
    write: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    if len >= LARGE {
        return ahead(len, read, write);
    }
    let mut at = 0;
    while at < len {
        buffer.resize((len - at).min(PIECE as u64) as usize, 0);
        read(at, buffer)?;
        write(at, buffer)?;
        at += buffer.len() as u64;
    }
    Ok(())
}

/// A thread reads, at most two pieces ahead. Buffers go back to it.
fn ahead(len: u64, read: Read<'_>, write: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let (filled, pieces) = sync_channel::<Result<(u64, Vec<u8>)>>(1);
    let (used, spare) = sync_channel::<Vec<u8>>(4);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut at = 0;
            while at < len {
                let mut buffer = spare.try_recv().unwrap_or_default();
                buffer.resize((len - at).min(PIECE as u64) as usize, 0);
                let piece = read(at, &mut buffer).map(|()| (at, buffer));
                at += PIECE as u64;
                // Nobody takes it when writing has failed.
                if piece.is_err() | filled.send(piece).is_err() {
                    return;
                }
            }
        });
        let mut result = Ok(());
        for piece in pieces {
            result = piece.and_then(|(at, buffer)| {
                write(at, &buffer)?;
                let _ = used.try_send(buffer);
                Ok(())
            });
            if result.is_err() {
                break;
            }
        }
        match reader.join() {
            Ok(()) => result,
            Err(_) => Err(Error::nonsense("reading died")),
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn move_all(len: u64, fail_read: u64, fail_write: u64) -> Result<Vec<u8>> {
        let read = |at: u64, buffer: &mut [u8]| {
            for (i, byte) in buffer.iter_mut().enumerate() {
                *byte = ((at + i as u64) % 251) as u8;
            }
            if at >= fail_read {
                Err(Error::nonsense("read"))
            } else {
                Ok(())
            }
        };
        let mut all = Vec::new();
        let mut write = |at: u64, bytes: &[u8]| {
            assert_eq!(at, all.len() as u64);
            all.extend_from_slice(bytes);
            if at >= fail_write {
                Err(Error::nonsense("write"))
            } else {
                Ok(())
            }
        };
        copy(len, &mut Vec::new(), &read, &mut write)?;
        Ok(all)
    }

    #[test]
    fn every_byte_is_moved_once() {
        for len in [0, 1, PIECE as u64 + 1, LARGE, LARGE + 12_345] {
            let all = move_all(len, u64::MAX, u64::MAX).unwrap();
            assert!(all.len() as u64 == len && all.iter().zip(0u64..).all(|(b, i)| u64::from(*b) == i % 251));
        }
    }

    #[test]
    fn either_side_may_fail() {
        for len in [3, LARGE + 5] {
            let end = len - 1 - (len - 1) % PIECE as u64;
            assert!(move_all(len, end, u64::MAX).unwrap_err().to_string().contains("read"));
            for at in [0, end] {
                assert!(move_all(len, u64::MAX, at).unwrap_err().to_string().contains("write"));
            }
        }
    }
}
