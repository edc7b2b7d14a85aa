//! Which extended registers this processor keeps for programs, and where they are in an XSAVE area (Intel SDM volume 1, chapter 13).

use std::arch::x86_64::{__cpuid, __cpuid_count};

/// The XSAVE area of this machine, in its standard format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// A bit for each kind of registers that the kernel has switched on (XCR0).
    pub features: u64,
    /// Number, offset and size of each kind behind the legacy area and the header.
    pub parts: Vec<(u32, usize, usize)>,
}

/// Length of what every XSAVE area begins with: x87 and SSE registers, header.
pub const BASE: usize = 576;

impl Layout {
    /// That of this machine.
    #[allow(unused_unsafe)]
    pub fn here() -> Layout {
        const OSXSAVE: u32 = 1 << 27;
        const LEAF: u32 = 0xd;
        // SAFETY: every x86-64 processor has the instruction.
        if unsafe { __cpuid(1) }.ecx & OSXSAVE == 0 {
            let parts = Vec::new();
            return Layout { features: 3, parts };
        }
        let (low, high): (u32, u32);
        // SAFETY: OSXSAVE says that the kernel lets programs read XCR0; nothing else is touched.
        unsafe {
            std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
        }
        let features = u64::from(high) << 32 | u64::from(low);
        let part = |number: u32| {
            // SAFETY: as above; leaf 0xd is there where XSAVE is.
            let told = unsafe { __cpuid_count(LEAF, number) };
            (number, told.ebx as usize, told.eax as usize)
        };
        let parts = (2..63).filter(|n| features >> n & 1 == 1).map(part).collect();
        Layout { features, parts }
    }

    /// Where an area ends that has only the given kinds of registers.
    pub fn end_of(&self, features: u64) -> usize {
        let within = self.parts.iter().filter(|p| features >> p.0 & 1 == 1);
        within.map(|p| p.1 + p.2).max().unwrap_or(0).max(BASE)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_area_is_as_long_as_the_kernel_says() {
        let here = Layout::here();
        assert_eq!(here.features & 3, 3);
        assert_eq!(here.end_of(3), BASE);
        if here.features & 4 != 0 {
            assert_eq!(here.end_of(7), 832);
        }
        // The kernel tells the length of what it switched on (CPUID 0xd, EBX).
        #[allow(unused_unsafe)]
        // SAFETY: leaf 0xd is there where XSAVE is.
        let told = unsafe { __cpuid_count(0xd, 0) }.ebx as usize;
        assert!(here.parts.is_empty() || here.end_of(here.features) == told);
    }
}
