//! Looking at what strangers stacked: file attributes of mounted layers, with a bound on how much is looked at.
//!
//! A small image can ask for a great many looks (directories it does not list × links × components × layers), so what one
//! supplement takes is counted, whatever it finds, and whoever no longer waits for it ends it.

use std::cell::{Cell, RefCell};
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::erofs;
use crate::tree::Xattrs;

/// Most looks for one supplement: a few seconds of work. Images of a million files behind a link need a part of it.
pub(crate) const MAX_LOOKS: u64 = 10_000_000;
/// A look at a path costs one, and one more for each so many bytes the kernel walks.
const BYTES_A_LOOK: usize = 64;
/// Most bytes of paths remembered, for all layers together.
const MAX_KNOWN: usize = 64 << 20;
/// Both calls give at most 64 KiB (XATTR_LIST_MAX, XATTR_SIZE_MAX).
const MAX_ATTRIBUTE: usize = 64 << 10;

/// Why a supplement is not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the directories they lead through without listing them take more than {MAX_LOOKS} looks")]
    TooManyLooks,
    #[error("what lies behind links of lower layers is too large")]
    TooLarge,
    #[error("the work was given up")]
    GivenUp,
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        Self::other(refused)
    }
}

pub(crate) struct Looks {
    left: Cell<u64>,
    room: Cell<usize>,
    given_up: Arc<AtomicBool>,
    names: RefCell<Vec<u8>>,
    value: RefCell<Vec<u8>>,
}

impl Looks {
    pub(crate) fn new(most: u64, given_up: Arc<AtomicBool>) -> Self {
        let buffer = || RefCell::new(vec![0; MAX_ATTRIBUTE]);
        Self { left: Cell::new(most), room: Cell::new(MAX_KNOWN), given_up, names: buffer(), value: buffer() }
    }

    /// Counts a look at `path`, which may be nothing but a step on the way.
    pub(crate) fn count(&self, path: &[u8]) -> Result<(), Refused> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(Refused::GivenUp);
        }
        let cost = 1 + (path.len() / BYTES_A_LOOK) as u64;
        self.left.set(self.left.get().checked_sub(cost).ok_or(Refused::TooManyLooks)?);
        Ok(())
    }

    /// Whether a path of this length may be remembered as well.
    pub(crate) fn may_keep(&self, length: usize) -> bool {
        let left = self.room.get().checked_sub(length + 64);
        left.map(|left| self.room.set(left)).is_some()
    }

    /// The extended attributes of a file without overlayfs' own.
    pub(crate) fn attributes(&self, path: &Path) -> io::Result<Xattrs> {
        self.count(path.as_os_str().as_bytes())?;
        let file = c_path(path)?;
        let mut names = self.names.borrow_mut();
        // SAFETY: the path ends in a zero byte and the buffer is as long as said; both live through the call.
        let length = unsafe { libc::llistxattr(file.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
        let Ok(length) = usize::try_from(length) else { return unsupported_is(Xattrs::new()) };
        let mut found = Xattrs::new();
        for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            if name.starts_with(b"trusted.overlay.") || erofs::split_xattr(name).is_none() {
                continue;
            }
            let mut value = self.value.borrow_mut();
            if let Some(length) = attribute(&file, name, &mut value)? {
                self.count(&value[..length])?;
                found.insert(name.into(), value[..length].into());
            }
        }
        Ok(found)
    }
}

/// Whether a file has an extended attribute, whatever its value.
pub(crate) fn has_attribute(path: &Path, name: &[u8]) -> io::Result<bool> {
    Ok(attribute(&c_path(path)?, name, &mut [])?.is_some())
}

/// The length of an attribute's value, which is in `value` unless that is empty.
fn attribute(path: &CString, name: &[u8], value: &mut [u8]) -> io::Result<Option<usize>> {
    let name = CString::new(name)?;
    // SAFETY: both names end in zero bytes and the buffer is as long as said (0 asks for the length alone); all live through
    // the call.
    let length = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    usize::try_from(length).map_or_else(|_| unsupported_is(None), |length| Ok(Some(length)))
}

/// The last call's error, or `value` where it only says that there are no attributes.
fn unsupported_is<T>(value: T) -> io::Result<T> {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(value),
        _ => Err(error),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_end_and_are_given_up() {
        let given_up = Arc::new(AtomicBool::new(false));
        let looks = Looks::new(10, given_up.clone());
        looks.count(b"a/b").unwrap();
        looks.count(&[b'a'; 4 * BYTES_A_LOOK]).unwrap();
        assert_eq!(looks.count(&[b'a'; 4 * BYTES_A_LOOK]), Err(Refused::TooManyLooks));
        looks.count(b"a/b").unwrap();
        given_up.store(true, Ordering::Relaxed);
        assert_eq!(looks.count(b"a"), Err(Refused::GivenUp));
    }
}
