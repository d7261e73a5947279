//! Descriptor tables and page tables, as bytes.

use std::collections::{BTreeMap, BTreeSet};

use polder_units::{Gpa, PAGE_SIZE};

use super::code::VECTORS;

/// Selectors: code and data of ring 0, data and code of ring 3, and the first TSS.
pub(super) const CODE_0: u16 = 0x08;
pub(super) const DATA_3: u16 = 0x18 | 3;
pub(super) const CODE_3: u16 = 0x20 | 3;
pub(super) const TSS: u16 = 0x28;

/// Bytes of a TSS, and of its descriptor.
pub(super) const TSS_BYTES: u32 = 104;
pub(super) const TSS_DESCRIPTOR: u16 = 16;

/// The interrupt stack that a double fault gets.
const DOUBLE_FAULT: usize = 8;

/// The global descriptor table, with a TSS for each base given.
pub(super) fn gdt(tss: &[Gpa]) -> Vec<u8> {
    let mut words = vec![
        0,
        0x00af_9b00_0000_ffff, // code, ring 0, 64-bit
        0x00cf_9300_0000_ffff, // data, ring 0
        0x00cf_f300_0000_ffff, // data, ring 3
        0x00af_fb00_0000_ffff, // code, ring 3, 64-bit
    ];
    for base in tss.iter().map(|base| base.get()) {
        let limit = u64::from(TSS_BYTES - 1);
        let low = (base & 0xff_ffff) << 16 | (base >> 24 & 0xff) << 56;
        words.push(limit | low | 0x8b << 40);
        words.push(base >> 32);
    }
    bytes(&words)
}

/// The interrupt descriptor table: interrupt gates into ring 0.
pub(super) fn idt(handlers: &[u64; VECTORS]) -> Vec<u8> {
    let mut words = Vec::new();
    for (vector, handler) in handlers.iter().enumerate() {
        let ist = u64::from(vector == DOUBLE_FAULT);
        let low = handler & 0xffff | (handler >> 16 & 0xffff) << 48;
        words.push(low | u64::from(CODE_0) << 16 | ist << 32 | 0x8e << 40);
        words.push(handler >> 32);
    }
    bytes(&words)
}

/// A task state segment: the stack of ring 0, and the one a double fault gets.
pub(super) fn tss(ring_0: Gpa, double_fault: Gpa) -> Vec<u8> {
    let mut tss = vec![0; 4];
    tss.extend(ring_0.get().to_le_bytes());
    tss.resize(0x24, 0);
    tss.extend(double_fault.get().to_le_bytes());
    tss.resize(0x66, 0);
    // No bitmap of ports: it would start past the end.
    tss.extend(u16::to_le_bytes(0x68));
    tss
}

const PRESENT_WRITE_USER: u64 = 0x7;
/// Accessed and dirty from the start: a walk has nothing to write into the tables.
const ACCESSED_DIRTY: u64 = 0x60;
const LARGE: u64 = 0x80;
const ENTRIES: u64 = 512;

/// Page tables that map the given gibibytes to themselves in entries of 2 MiB, for ring 3 too.
/// Page `n` of the result goes to `base + n` pages; the first is the root.
pub(super) fn page_tables(base: Gpa, gibibytes: &BTreeSet<u64>) -> Vec<u8> {
    // Each level's tables by number: table `t` of 1 GiB entries holds the gibibytes `t * 512`...
    let of_512g: BTreeSet<u64> = gibibytes.iter().map(|gib| gib / ENTRIES).collect();
    let address = |page: u64| base.get() + page * PAGE_SIZE;
    let places = |first: u64, tables: &BTreeSet<u64>| -> BTreeMap<u64, u64> {
        tables.iter().zip(first..).map(|(table, page)| (*table, address(page))).collect()
    };
    let middle = places(1, &of_512g);
    let leaves = places(1 + of_512g.len() as u64, gibibytes);

    let table = |entry: &dyn Fn(u64) -> Option<u64>| -> Vec<u64> {
        (0..ENTRIES).map(|index| entry(index).unwrap_or(0)).collect()
    };
    let upper = |address: &u64| address | PRESENT_WRITE_USER | ACCESSED_DIRTY;
    let mut words = table(&|index| middle.get(&index).map(upper));
    for number in &of_512g {
        words.extend(table(&|index| leaves.get(&(number * ENTRIES + index)).map(upper)));
    }
    for gib in gibibytes {
        let flags = PRESENT_WRITE_USER | ACCESSED_DIRTY | LARGE;
        words.extend(table(&|index| Some(gib << 30 | index << 21 | flags)));
    }
    bytes(&words)
}

/// Words in the order of memory.
pub(super) fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the tables map `gpa` to.
    fn walk(tables: &[u8], base: u64, gpa: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - base + index * 8).unwrap();
            let entry = u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
            (entry & 1 == 1).then_some(entry & !0xfff)
        };
        let middle = entry(base, gpa >> 39)?;
        let leaf = entry(middle, gpa >> 30 & 511)?;
        Some(entry(leaf, gpa >> 21 & 511)? | gpa & 0x1f_ffff)
    }

    #[test]
    fn what_is_mapped_is_mapped_to_itself() {
        let gibibytes = BTreeSet::from([0, 3, 4, 511, 512, 1025]);
        let tables = page_tables(Gpa::new(0x7000), &gibibytes);
        assert_eq!(tables.len() as u64, (1 + 3 + 6) * PAGE_SIZE);
        for gib in 0..1100u64 {
            let gpa = (gib << 30) + 0x1234_5678;
            let mapped = gibibytes.contains(&gib).then_some(gpa);
            assert_eq!(walk(&tables, 0x7000, gpa), mapped, "{gpa:#x}");
        }
    }

    #[test]
    fn tables_have_the_size_the_manual_gives() {
        assert_eq!(tss(Gpa::new(1), Gpa::new(2)).len() as u64, u64::from(TSS_BYTES));
        assert_eq!(idt(&[0; VECTORS]).len(), VECTORS * 16);
        assert_eq!(gdt(&[Gpa::new(0); 4]).len(), usize::from(TSS) + 4 * 16);
    }
}
