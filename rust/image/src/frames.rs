//! The frame table: where each MiB of a compressed data area is stored.

use crate::checksum;
use crate::codec::Codec;
use crate::layout::{BLOCK_SIZE, DATA_START, FRAME_LEN, u32_at, u64_at};

/// One frame: a block of the data area as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Where it is in the file.
    pub offset: u64,
    /// Length there; that of the block if it is stored as it is.
    pub stored: u32,
    /// Length of the block.
    pub raw: u32,
    /// XXH3-64 of the stored bytes.
    pub stored_sum: u64,
    /// XXH3-64 of the block.
    pub raw_sum: u64,
}

impl Frame {
    pub(crate) fn encode(&self) -> [u8; FRAME_LEN] {
        let mut bytes = [0; FRAME_LEN];
        bytes[0..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.stored.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.raw.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.stored_sum.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.raw_sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Frame {
        Frame {
            offset: u64_at(bytes, 0),
            stored: u32_at(bytes, 8),
            raw: u32_at(bytes, 12),
            stored_sum: u64_at(bytes, 16),
            raw_sum: u64_at(bytes, 24),
        }
    }

    /// Makes the stored bytes whole, in place of what `raw` held. False if they are not what was written.
    pub(crate) fn unpack(&self, codec: Codec, stored: &[u8], raw: &mut Vec<u8>) -> bool {
        if checksum::of(stored) != self.stored_sum {
            return false;
        }
        raw.resize(self.raw as usize, 0);
        if self.stored == self.raw {
            raw.copy_from_slice(stored);
        } else if !codec.unpack(stored, raw) {
            return false;
        }
        checksum::of(raw) == self.raw_sum
    }
}

/// All frames of a file, in order: each but the last holds a whole block, and they follow each other without a gap.
#[derive(Debug)]
pub(crate) struct Frames {
    pub codec: Codec,
    list: Vec<Frame>,
    /// Where the stored bytes of the last one end.
    end: u64,
}

impl Frames {
    pub(crate) fn new(codec: Codec) -> Frames {
        Frames {
            codec,
            list: Vec::new(),
            end: DATA_START,
        }
    }

    /// Takes the next record of the table. Says what is wrong with it.
    pub(crate) fn push(&mut self, record: &[u8]) -> Result<(), &'static str> {
        let frame = Frame::decode(record);
        if self.list.last().is_some_and(|last| (last.raw as usize) < BLOCK_SIZE) {
            return Err("a short frame before the last");
        }
        if frame.raw == 0 || frame.raw as usize > BLOCK_SIZE || frame.stored == 0 || frame.stored > frame.raw {
            return Err("length out of range");
        }
        if frame.offset != self.end {
            return Err("it does not begin where the one before it ends");
        }
        // 2^20 at most for each: this cannot wrap.
        self.end += u64::from(frame.stored);
        self.list.push(frame);
        Ok(())
    }

    /// Where the stored bytes end: the end of the data area of the file.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    pub(crate) fn get(&self, number: u64) -> Option<&Frame> {
        self.list.get(usize::try_from(number).ok()?)
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Length of the data area when all is unpacked.
    pub(crate) fn data_len(&self) -> u64 {
        self.list.iter().map(|frame| u64::from(frame.raw)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Compression, Encoder};

    fn frame(offset: u64, stored: u32, raw: u32) -> Frame {
        Frame {
            offset,
            stored,
            raw,
            stored_sum: 1,
            raw_sum: 2,
        }
    }

    fn decode(frames: &[Frame], data_end: u64) -> Result<Frames, &'static str> {
        let mut table = Frames::new(Codec::Lz4);
        frames.iter().try_for_each(|frame| table.push(&frame.encode()))?;
        if table.end() == data_end { Ok(table) } else { Err("end") }
    }

    #[test]
    fn a_table_describes_the_whole_area_and_nothing_else() {
        let mib = BLOCK_SIZE as u32;
        let good = [
            frame(4096, 100, mib),
            frame(4196, mib, mib),
            frame(4196 + (1 << 20), 5, 5),
        ];
        let end = 4201 + (1 << 20);
        let frames = decode(&good, end).unwrap();
        assert_eq!((frames.len(), frames.data_len()), (3, (2 << 20) + 5));
        assert_eq!(frames.get(1), Some(&good[1]));
        assert!(frames.get(3).is_none() && decode(&[], 4096).is_ok());
        assert!(decode(&good, end + 1).is_err() && decode(&good[..2], end).is_err() && decode(&[], 4097).is_err());
        let lies = [
            (0, 100, mib),
            (4095, 100, mib),
            (4096, 0, mib),
            (4096, mib + 1, mib),
            (4096, 100, mib - 1),
            (4096, 100, mib + 1),
            (4096, 100, 0),
        ];
        for (offset, stored, raw) in lies {
            assert!(
                decode(&[frame(offset, stored, raw), good[1], good[2]], end).is_err(),
                "{offset} {stored} {raw}"
            );
        }
        for raw in [0, mib + 1, u32::MAX] {
            assert!(decode(&[frame(4096, 5, raw)], 4101).is_err(), "{raw}");
        }
    }

    #[test]
    fn a_changed_frame_does_not_come_out_as_something_else() {
        let raw: Vec<u8> = (0..3000_u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
        for how in [Compression::Lz4, Compression::Zstd(3)] {
            let mut packed = Vec::new();
            assert!(Encoder::new(how).unwrap().pack(&raw, &mut packed));
            let mut frame = frame(4096, packed.len() as u32, raw.len() as u32);
            frame.raw_sum = checksum::of(&raw);
            let mut out = Vec::new();
            let mut harmless = 0;
            for bit in 0..8 * packed.len() {
                packed[bit / 8] ^= 1 << (bit % 8);
                frame.stored_sum = 0;
                assert!(
                    !frame.unpack(how.codec().unwrap(), &packed, &mut out),
                    "bit {bit} of damage"
                );
                // Whoever forges it makes the checksum right: then only bits that the codec does not use may pass.
                frame.stored_sum = checksum::of(&packed);
                if frame.unpack(how.codec().unwrap(), &packed, &mut out) {
                    assert!(out == raw, "{how}: bit {bit}");
                    harmless += 1;
                }
                packed[bit / 8] ^= 1 << (bit % 8);
            }
            assert!(harmless < 64, "{how}: {harmless}");
            frame.stored_sum = checksum::of(&packed);
            assert!(frame.unpack(how.codec().unwrap(), &packed, &mut out) && out == raw);
        }
    }
}
