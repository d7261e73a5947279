//! An access of many bytes, cut at page boundaries.

use polder_units::{PAGE_SHIFT, PAGE_SIZE};

/// The part of each page in `bytes` at address `address`: page number, offset in it, bytes.
///
/// An address past 2^64 wraps, as a guest's does.
pub(crate) fn chunks(
    mut address: u64,
    mut bytes: &[u8],
) -> impl Iterator<Item = (u64, u64, &[u8])> {
    core::iter::from_fn(move || {
        let (page, at, len) = next(&mut address, bytes.len())?;
        let (chunk, rest) = bytes.split_at(len);
        bytes = rest;
        Some((page, at, chunk))
    })
}

/// As [`chunks`], to be written to.
pub(crate) fn chunks_mut(
    mut address: u64,
    mut bytes: &mut [u8],
) -> impl Iterator<Item = (u64, u64, &mut [u8])> {
    core::iter::from_fn(move || {
        let (page, at, len) = next(&mut address, bytes.len())?;
        let (chunk, rest) = core::mem::take(&mut bytes).split_at_mut(len);
        bytes = rest;
        Some((page, at, chunk))
    })
}

/// The numbers of the pages that `len` bytes at `address` touch.
pub(crate) fn pages(mut address: u64, mut len: usize) -> impl Iterator<Item = u64> {
    core::iter::from_fn(move || {
        let (page, _, done) = next(&mut address, len)?;
        len -= done;
        Some(page)
    })
}

fn next(address: &mut u64, left: usize) -> Option<(u64, u64, usize)> {
    if left == 0 {
        return None;
    }
    let (page, at) = (*address >> PAGE_SHIFT, *address % PAGE_SIZE);
    let len = usize::try_from(PAGE_SIZE - at).map_or(left, |rest| rest.min(left));
    *address = address.wrapping_add(len as u64);
    Some((page, at, len))
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn an_access_is_cut_where_pages_end() {
        let bytes = [7; 4100];
        let cut: Vec<_> = chunks(4094, &bytes).map(|(page, at, b)| (page, at, b.len())).collect();
        assert_eq!(cut, [(0, 4094, 2), (1, 0, 4096), (2, 0, 2)]);
        assert!(pages(4094, 4100).eq(0..3));
        assert_eq!(pages(0, 0).next(), None);
    }
}
