//! Accesses of a guest: translated as a whole, then made.

use alloc::vec::Vec;

use polder_units::{Gpa, PAGE_SIZE, Pfn};

use super::{Exit, Side, Vcpu};
use crate::chunk::{chunks, chunks_mut, pages};
use crate::rmp::Cipher;
use crate::tlb::guest_tag;

impl Vcpu<'_> {
    /// Reads guest memory. All pages are translated before the first byte is read.
    ///
    /// # Errors
    /// [`Exit::Fault`], [`Exit::PageFault`] or [`Exit::Refused`] at the first page that is not let
    /// through.
    pub fn read(&mut self, gpa: Gpa, side: Side, buffer: &mut [u8]) -> Result<(), Exit> {
        let frames = self.translate_all(gpa, side, buffer.len(), false)?;
        for (pfn, (_, at, chunk)) in frames.zip(chunks_mut(gpa.get(), buffer)) {
            self.frames.read(pfn, at, chunk);
            if let Some(cipher) = self.cipher(side) {
                cipher.apply(pfn, at, chunk);
            }
        }
        Ok(())
    }

    /// Writes guest memory. All pages are translated before the first byte is written.
    ///
    /// # Errors
    /// As [`Vcpu::read`].
    pub fn write(&mut self, gpa: Gpa, side: Side, bytes: &[u8]) -> Result<(), Exit> {
        self.tables.clear();
        let frames = self.translate_all(gpa, side, bytes.len(), true)?;
        let tables = core::mem::take(&mut self.tables);
        let mut tables = tables.into_iter();
        for (pfn, (page, at, chunk)) in frames.zip(chunks(gpa.get(), bytes)) {
            match self.cipher(side) {
                None => self.frames.write(pfn, at, chunk),
                Some(cipher) => self.frames.write_private(cipher, pfn, at, chunk),
            }
            if tables.as_slice().first().is_some_and(|(at, _)| *at == page)
                && let Some((_, gfn)) = tables.next()
            {
                self.wrote_table(gfn, at, chunk.len());
            }
        }
        Ok(())
    }

    /// Reads 8 bytes, little-endian.
    ///
    /// # Errors
    /// As [`Vcpu::read`].
    #[inline]
    pub fn read_u64(&mut self, gpa: Gpa, side: Side) -> Result<u64, Exit> {
        if gpa.page_offset() <= PAGE_SIZE - 8 {
            let pfn = self.translate(gpa.gfn().get(), side, false)?;
            let word = self.frames.read_u64(pfn, gpa.page_offset());
            let cipher = self.cipher(side);
            return Ok(word ^ cipher.map_or(0, |it| it.word_at(pfn, gpa.page_offset())));
        }
        let mut word = [0; 8];
        self.read(gpa, side, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Writes 8 bytes, little-endian.
    ///
    /// # Errors
    /// As [`Vcpu::write`].
    #[inline]
    pub fn write_u64(&mut self, gpa: Gpa, side: Side, value: u64) -> Result<(), Exit> {
        self.write(gpa, side, &value.to_le_bytes())
    }

    /// The frames of every page of an access; nothing is allocated for one page.
    fn translate_all(
        &mut self,
        gpa: Gpa,
        side: Side,
        len: usize,
        write: bool,
    ) -> Result<impl Iterator<Item = Pfn> + use<>, Exit> {
        let mut gfns = pages(gpa.get(), len);
        let first = gfns.next().map(|gfn| self.translate(gfn, side, write)).transpose()?;
        let rest: Result<Vec<_>, Exit> = gfns.map(|gfn| self.translate(gfn, side, write)).collect();
        Ok(first.into_iter().chain(rest?))
    }

    #[inline]
    fn translate(&mut self, page: u64, side: Side, write: bool) -> Result<Pfn, Exit> {
        let root = self.state.roots.tag();
        let tag = guest_tag(page, side == Side::Private, root);
        match self.state.tlb.hit(tag, write) {
            Some(pfn) => Ok(pfn),
            None if root == 0 => self.walk(page, side, write, tag),
            None => self.walk_shadow(page, side, write, tag),
        }
    }

    /// What the contents of memory of this side are encrypted with.
    #[inline]
    fn cipher(&self, side: Side) -> Option<Cipher> {
        self.snp.filter(|_| side == Side::Private).map(|snp| Cipher::new(snp.key))
    }
}
