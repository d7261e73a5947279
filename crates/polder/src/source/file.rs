//! A file as a source: page `n` of the object is page `n` of the file.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use polder_units::{ByteSize, PAGE_SIZE, PageCount, PageRange};
use rustix::fs::{Advice, Mode, OFlags, SeekFrom};

use super::{Extent, Source, SourceError};

/// A file that contents are read from. Its holes are zeros.
///
/// The file must stay as it is while pages are owed. That is looked at after each read: pages read
/// from a file that was changed since it was opened fail, and so does what a truncated file does
/// not have any more.
///
/// # Holes
/// The change is told by size and modification time. A file that is written through a mapping gets
/// a new time late: on most file systems when it is written back.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    path: PathBuf,
    pages: PageCount,
    born: Stamp,
    /// Whether the file has holes worth looking for.
    sparse: bool,
}

/// What tells a file that was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { size: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()) })
    }
}

/// Why a file can't be a source.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It can't be opened.
    #[error("{path} can't be opened", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no regular file.
    #[error("{path} is no regular file", path = .path.display())]
    NoFile {
        /// What it is at.
        path: PathBuf,
    },
    /// It is no whole number of pages, or empty.
    #[error("{path} has {bytes} bytes, which are no whole pages of 4K", path = .path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is of another size than the memory.
    #[error("{path} has {file}, and the memory {memory}", path = .path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Its size.
        file: ByteSize,
        /// The memory's.
        memory: ByteSize,
    },
}

impl OpenError {
    /// What the user can do about it.
    pub fn way_out(&self) -> String {
        match self {
            Self::Open { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => "check the path".into(),
                std::io::ErrorKind::PermissionDenied => "make it readable for this user".into(),
                _ => "check the path, and the file system that it is on".into(),
            },
            Self::NoFile { .. } => "copy what it holds to a regular file".into(),
            Self::Size { bytes: 0, .. } => "give a file that has contents".into(),
            Self::Size { path, bytes } => format!(
                "fill it up: truncate -s {} {}",
                bytes.next_multiple_of(PAGE_SIZE),
                path.display()
            ),
            Self::Mismatch { file, .. } => format!("ask for memory of the file's size: {file}"),
        }
    }
}

impl FileSource {
    /// Opens a file.
    ///
    /// # Errors
    /// [`OpenError`], but for [`OpenError::Mismatch`].
    ///
    /// ```
    /// # use polder::{Memory, source::FileSource};
    /// # use std::sync::Arc;
    /// # fn restore() -> Result<Memory, Box<dyn std::error::Error>> {
    /// let file = FileSource::open("guest.img").inspect_err(|error| eprintln!("{}", error.way_out()))?;
    /// let memory = Memory::builder(file.pages()).shared().source(Arc::new(file)).build()?;
    /// # Ok(memory)
    /// # }
    /// ```
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref().to_owned();
        let open = || {
            // Whoever opens a named pipe for reading waits for somebody who writes, unless he says
            // so.
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
            Ok((file.metadata()?, Stamp::of(&file)?, file))
        };
        let opened: std::io::Result<_> = open();
        let (meta, born, file) = match opened {
            Ok(opened) => opened,
            Err(source) => return Err(OpenError::Open { path, source }),
        };
        if !meta.is_file() {
            return Err(OpenError::NoFile { path });
        }
        let pages = ByteSize::new(born.size).pages().ok().filter(|pages| !pages.is_zero());
        let Some(pages) = pages else { return Err(OpenError::Size { path, bytes: born.size }) };
        let sparse = meta.blocks().saturating_mul(512) < born.size;
        Ok(Self { file, path, pages, born, sparse })
    }

    /// The pages that it has.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// Refuses memory of another size.
    ///
    /// # Errors
    /// [`OpenError::Mismatch`].
    pub fn check_size(&self, memory: ByteSize) -> Result<(), OpenError> {
        if memory.get() == self.born.size {
            return Ok(());
        }
        let (path, file) = (self.path.clone(), ByteSize::new(self.born.size));
        Err(OpenError::Mismatch { path, file, memory })
    }

    /// Where the next byte is that `to` looks for, if there is one.
    fn seek(&self, to: SeekFrom) -> Option<u64> {
        rustix::fs::seek(&self.file, to).ok()
    }
}

impl Source for FileSource {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn read(&self, pages: PageRange, into: &mut [u8]) -> Result<usize, SourceError> {
        let start = pages.start().offset();
        let mut came = 0;
        while came < into.len() {
            match self.file.read_at(&mut into[came..], start + came as u64) {
                Ok(0) => break,
                Ok(count) => came += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        let now = Stamp::of(&self.file).map_err(|error| failed(&error))?;
        if now.size < self.born.size && start + (came as u64) < pages.end() * PAGE_SIZE {
            return Err(SourceError::Ended(now.size));
        }
        if now != self.born {
            return Err(SourceError::Changed);
        }
        Ok(came)
    }

    fn extent(&self, pages: PageRange) -> Extent {
        if !self.sparse {
            return Extent::Bytes(pages);
        }
        let (start, end) = (pages.start().offset(), pages.end() * PAGE_SIZE);
        // A file that ends early has a hole there, for `lseek`: it is for a read to find.
        let data = self.seek(SeekFrom::Data(start)).unwrap_or(self.born.size).min(end);
        let to_page = |byte: u64| byte / PAGE_SIZE;
        let at = pages.start().get();
        if now_shorter(&self.file, self.born.size) {
            return Extent::Bytes(pages);
        }
        if let Some(zeros) = PageRange::between(at, to_page(data)) {
            return Extent::Zeros(zeros);
        }
        let hole = self.seek(SeekFrom::Hole(start)).unwrap_or(end).min(end);
        let bytes = PageRange::between(at, hole.div_ceil(PAGE_SIZE).max(at + 1));
        Extent::Bytes(bytes.and_then(|bytes| bytes.intersection(pages)).unwrap_or(pages))
    }

    fn will_need(&self, pages: PageRange) {
        let length = pages.count().bytes().and_then(std::num::NonZeroU64::new);
        // It is a hint: that it was not taken is no error.
        let _ = rustix::fs::fadvise(&self.file, pages.start().offset(), length, Advice::WillNeed);
    }
}

fn now_shorter(file: &File, size: u64) -> bool {
    file.metadata().is_ok_and(|meta| meta.len() < size)
}

fn failed(error: &std::io::Error) -> SourceError {
    SourceError::Read(polder_linux::Errno::from_io_error(error).unwrap_or(polder_linux::Errno::IO))
}
