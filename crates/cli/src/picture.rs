//! A picture of guest memory for the terminal.

use std::fmt::Write;

use polder::units::{ByteSize, Level, PAGE_SIZE, PageCount, PageRange};
use polder::{PageFacts, Visibility};

const COLUMNS: u64 = 64;
const ROWS: u64 = 4;

/// How many pages of a cell are what.
#[derive(Clone, Copy, Default)]
struct Cell {
    private: u64,
    shared: u64,
    untouched: u64,
}

impl Cell {
    fn add(&mut self, visibility: Visibility, touched: u64, untouched: u64) {
        match visibility {
            Visibility::Private => self.private += touched,
            Visibility::Shared => self.shared += touched,
        }
        self.untouched += untouched;
    }

    fn glyph(self) -> char {
        match (self.private, self.shared) {
            (0, 0) => '·',
            (_, 0) => '█',
            (0, _) => '░',
            (_, _) => '▒',
        }
    }
}

/// The bytes that were touched of private pages, and of shared ones.
pub(crate) fn touched_bytes(facts: &[(PageRange, PageFacts)], touched: &[PageRange]) -> (u64, u64) {
    let mut all = Cell::default();
    let end = facts.last().map_or(0, |(run, _)| run.end());
    for (visibility, touched, untouched) in parts(0, end, facts, touched) {
        all.add(visibility, touched, untouched);
    }
    (all.private * PAGE_SIZE, all.shared * PAGE_SIZE)
}

/// Draws memory of `pages` pages: private, shared, untouched, in cells of equal size.
pub(crate) fn draw(
    pages: PageCount,
    facts: &[(PageRange, PageFacts)],
    touched: &[PageRange],
    folios: &[(PageRange, Level)],
) -> String {
    let per_cell = pages.get().div_ceil(COLUMNS * ROWS).next_power_of_two();
    let mut cells = Vec::new();
    let mut all = Cell::default();
    let mut start = 0;
    while start < pages.get() {
        let end = (start + per_cell).min(pages.get());
        let mut cell = Cell::default();
        for (visibility, touched, untouched) in parts(start, end, facts, touched) {
            cell.add(visibility, touched, untouched);
            all.add(visibility, touched, untouched);
        }
        cells.push(cell.glyph());
        start = end;
    }
    let mut picture = String::new();
    let has_large = folios.iter().any(|(_, level)| *level > Level::Size4K);
    let per_row = usize::try_from(COLUMNS).unwrap_or(usize::MAX);
    for (row, glyphs) in (0u64..).zip(cells.chunks(per_row)) {
        let offset = ByteSize::new(row * COLUMNS * per_cell * PAGE_SIZE).to_string();
        let glyphs: String = glyphs.iter().collect();
        let _ = writeln!(picture, "  {offset:>6} {glyphs}");
        if has_large {
            let first = row * COLUMNS * per_cell;
            let cells = (0..glyphs.chars().count() as u64).map(|cell| first + cell * per_cell);
            let levels: String = cells.map(|at| letter(at, at + per_cell, folios)).collect();
            let _ = writeln!(picture, "         {levels}");
        }
    }
    let size = |pages: u64| rounded(pages * PAGE_SIZE);
    let _ = writeln!(
        picture,
        "         █ private {}   ░ shared {}   ▒ both   · untouched {}   (a cell is {})",
        size(all.private),
        size(all.shared),
        size(all.untouched),
        size(per_cell),
    );
    if has_large {
        picture.push_str("         below: the smallest page in the cell: G 1G   M 2M   k 4K\n");
    }
    picture
}

/// The level of the smallest folio in the pages `[start..end)`, as a letter.
fn letter(start: u64, end: u64, folios: &[(PageRange, Level)]) -> char {
    let first = folios.partition_point(|(run, _)| run.end() <= start);
    let within = folios[first..].iter().take_while(|(run, _)| run.start().get() < end);
    match within.map(|(_, level)| *level).min() {
        Some(Level::Size1G) => 'G',
        Some(Level::Size2M) => 'M',
        Some(Level::Size4K) => 'k',
        None => ' ',
    }
}

/// Bytes as a person reads them: three digits that count.
pub(crate) fn rounded(bytes: u64) -> String {
    let units = [(1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    let Some((unit, name)) = units.into_iter().find(|&(unit, _)| bytes >= unit) else {
        return bytes.to_string();
    };
    let tenths = (bytes / (unit / 1024) * 10 + 512) / 1024;
    match tenths % 10 {
        // 1023.99M is a G.
        _ if tenths >= 10235 && unit < 1 << 40 => rounded(unit * 1024),
        0 => format!("{}{name}", tenths / 10),
        rest if tenths < 1000 => format!("{}.{rest}{name}", tenths / 10),
        _ => format!("{}{name}", (tenths + 5) / 10),
    }
}

/// The runs of equal visibility in the pages `[start..end)`, and how many pages of each were
/// touched and not.
fn parts<'a>(
    start: u64,
    end: u64,
    facts: &'a [(PageRange, PageFacts)],
    touched: &'a [PageRange],
) -> impl Iterator<Item = (Visibility, u64, u64)> + 'a {
    let cell = PageRange::between(start, end);
    let first = facts.partition_point(move |(run, _)| run.end() <= start);
    facts[first..].iter().map_while(move |(run, facts)| {
        let part = run.intersection(cell?)?;
        let first = touched.partition_point(|run| run.end() <= part.start().get());
        let touched = touched[first..].iter().map_while(|run| run.intersection(part));
        let touched: u64 = touched.map(|run| run.count().get()).sum();
        Some((facts.visibility, touched, part.count().get() - touched))
    })
}

#[cfg(test)]
mod tests {
    use polder::Population;

    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::between(start, end).unwrap()
    }

    #[test]
    fn sizes_are_rounded_for_people() {
        for (bytes, says) in [
            (0, "0"),
            (4096, "4K"),
            (4500 << 10, "4.4M"),
            (60968 << 10, "59.5M"),
            (64 << 20, "64M"),
            ((256 << 30) - (9 << 20), "256G"),
            ((1 << 40) - (9 << 20), "1T"),
            ((1 << 40) - (1 << 30), "1023G"),
            ((1 << 20) - 1, "1M"),
            (u64::MAX, "16777216T"),
        ] {
            assert_eq!(rounded(bytes), says, "{bytes}");
        }
    }

    #[test]
    fn every_kind_of_cell_is_drawn_and_counted() {
        let facts = |visibility| PageFacts { visibility, population: Population::Whole };
        let runs = [
            (range(0, 5), facts(Visibility::Private)),
            (range(5, 8), facts(Visibility::Shared)),
            (range(8, 16), facts(Visibility::Private)),
        ];
        let touched = [range(0, 7), range(9, 10)];
        let picture = draw(PageCount::from(1024), &runs, &touched, &[]);
        assert!(picture.starts_with("       0 █▒█·"), "{picture}");
        assert!(picture.contains("private 24K   ░ shared 8K"), "{picture}");
        let picture = draw(PageCount::from(16), &runs, &touched, &[]);
        assert!(picture.starts_with("       0 █████░░··█······\n"), "{picture}");
        assert!(picture.contains("untouched 32K"), "{picture}");
        assert_eq!(touched_bytes(&runs, &touched), (24 << 10, 8 << 10));
        let folios = [(range(0, 8), Level::Size2M), (range(8, 16), Level::Size4K)];
        let picture = draw(PageCount::from(16), &runs, &touched, &folios);
        assert!(picture.contains("\n         MMMMMMMMkkkkkkkk\n"), "{picture}");
        assert!(picture.ends_with("M 2M   k 4K\n"), "{picture}");
    }
}
