//! The backing file that an image names.

use super::Writer;
use super::head::Head;
use super::rewrite::{Change, Edit};
use crate::qcow2::error::{Error, Result};
use crate::qcow2::header::Backing;
use crate::qcow2::wire;
use crate::storage::{Storage, WritableStorage};

impl Writer {
    /// Names another backing file, or none. What was written before counts on the one that was named then.
    ///
    /// # Errors
    /// As [`set_backing`].
    pub fn set_backing(&mut self, backing: Option<&Backing>) -> Result<()> {
        let Some(change) = change(&self.head, backing)? else { return Ok(()) };
        let way = self.head.plan(&change)?;
        self.guarded(|writer| writer.head.go(&*writer.storage, way))
    }
}

/// Names another backing file, or none, in the header of an image; nothing else in the image is touched or looked at, so
/// that it may also be one that was not closed.
///
/// Whenever it is interrupted, the image has the old name or the new one. Unknown autoclear bits are cleared, as the
/// specification wants it of all who change an image. The table that gives names to feature bits is left out where
/// there is no room for it.
///
/// # Errors
/// [`Error::NotWritable`] where the image is marked as corrupt, [`Error::Name`] and [`Error::TableTooLarge`] where no image
/// can have that name, [`Error::NoRoomInHeader`]: nothing was written then. What is wrong with the header; what the system
/// says.
pub fn set_backing(storage: &dyn WritableStorage, backing: Option<&Backing>) -> Result<()> {
    let mut head = Head::read(&storage)?;
    let Some(change) = change(&head, backing)? else { return Ok(()) };
    let way = head.plan(&change)?;
    head.go(storage, way)
}

/// Whether [`set_backing`] would change something, and can.
///
/// # Errors
/// As [`set_backing`], which says it before it writes.
pub(crate) fn plan_backing(storage: &dyn Storage, backing: Option<&Backing>) -> Result<bool> {
    let head = Head::read(storage)?;
    let Some(change) = change(&head, backing)? else { return Ok(false) };
    head.plan(&change).map(|_| true)
}

/// The change that it takes, or none where the header says it already.
fn change<'a>(head: &Head, backing: Option<&'a Backing>) -> Result<Option<Change<'a>>> {
    if head.header().is_corrupt() {
        return Err(Error::NotWritable { reason: "some program marked it as corrupt: repair it first" });
    }
    if let Some(Backing { name, format }) = backing {
        check_text("the backing file name", name, wire::BACKING_NAME_MAX)?;
        format.iter().try_for_each(|format| check_text("the backing file format", format, wire::BACKING_FORMAT_MAX))?;
    }
    let other = head.header().backing.as_ref() != backing;
    Ok(other.then(|| Change { backing: Edit::Becomes(backing), ..Change::default() }))
}

fn check_text(what: &'static str, text: &str, most: u64) -> Result<()> {
    let refuse = |reason| Err(Error::Name { what, name: text.to_owned(), reason });
    if text.is_empty() {
        return refuse("is empty");
    }
    if text.contains('\0') {
        return refuse("has a NUL in it");
    }
    let bytes = text.len() as u64;
    if bytes > most { Err(Error::TableTooLarge { what, bytes, most }) } else { Ok(()) }
}
