//! Bytes of the virtual disk out of one image.

use super::address::{GuestOffset, HostOffset};
use super::codec::Inflater;
use super::entry::CompressedCluster;
use super::error::{Error, Result};
use super::header::Header;
use super::image::{Image, read_to_end};
use super::map::{Content, MapBuffer};
use crate::storage::{Storage, to_usize};

/// Inflates compressed clusters into buffers of its own; one for each thread.
#[derive(Debug, Default)]
pub struct ClusterReader {
    inflater: Inflater,
    input: Vec<u8>,
    cluster: Vec<u8>,
}

impl ClusterReader {
    /// The bytes of the compressed cluster of an image, whole.
    ///
    /// # Errors
    /// [`Error::Compressed`] where the stream is damaged or ends with the file before it is whole, [`Error::Io`].
    pub fn read(&mut self, image: &Image, guest: GuestOffset, data: CompressedCluster) -> Result<&[u8]> {
        self.read_from(image.storage(), image.header(), guest, data)
    }

    /// The same of an image that is being changed.
    pub(super) fn read_from(
        &mut self,
        storage: &dyn Storage,
        header: &Header,
        guest: GuestOffset,
        data: CompressedCluster,
    ) -> Result<&[u8]> {
        // no entry tells more
        let data = CompressedCluster { length: data.length.min(2 * header.geometry.cluster_size()), ..data };
        self.input.resize(to_usize(data.length), 0);
        read_to_end(storage, &mut self.input, data.host, "a compressed cluster")?;
        self.cluster.resize(to_usize(header.geometry.cluster_size()), 0);
        // zeroes behind the end would be a part of the stream
        let there = storage.length().saturating_sub(data.host.0).min(data.length);
        let stream = self.input.get(..to_usize(there)).unwrap_or_default();
        self.inflater.inflate(header.codec, stream, &mut self.cluster).map_err(|mut reason| {
            if there < data.length {
                reason += ", and the file ends there";
            }
            Error::Compressed { host: data.host, guest, reason }
        })?;
        Ok(&self.cluster)
    }

    /// The compressed bytes of the cluster that was [read](ClusterReader::read) last, with what follows them in their last
    /// sector; zeroes behind the end of the file.
    #[must_use]
    pub fn stream(&self) -> &[u8] {
        &self.input
    }

    /// The bytes of the cluster that was [read](ClusterReader::read) last.
    #[must_use]
    pub fn last(&self) -> &[u8] {
        &self.cluster
    }
}

/// Reads the virtual disk of one image.
#[derive(Debug)]
pub struct Reader<'a> {
    image: &'a Image,
    map: MapBuffer,
    clusters: ClusterReader,
}

impl<'a> Reader<'a> {
    /// A reader with buffers of its own.
    #[must_use]
    pub fn new(image: &'a Image) -> Self {
        Self { image, map: MapBuffer::default(), clusters: ClusterReader::default() }
    }

    /// Fills `buffer` from a guest offset on.
    ///
    /// # Errors
    /// [`Error::BeyondDisk`] where the range ends behind the disk, [`Error::NeedsBacking`] where a part of it is in
    /// a backing file, and what is wrong with the image.
    pub fn read(&mut self, buffer: &mut [u8], offset: GuestOffset) -> Result<()> {
        let size = self.image.size();
        let length = buffer.len() as u64;
        let end = offset.0.checked_add(length).filter(|end| *end <= size);
        let end = end.ok_or(Error::BeyondDisk { offset, length, size })?;
        let mut extents = Vec::new();
        self.image.map(offset.0..end, &mut self.map, |extent| extents.push(extent))?;
        let mut rest = buffer;
        for extent in extents {
            let (part, behind) = rest.split_at_mut(to_usize(extent.guest.end - extent.guest.start));
            self.fill(part, GuestOffset(extent.guest.start), extent.content)?;
            rest = behind;
        }
        Ok(())
    }

    fn fill(&mut self, part: &mut [u8], guest: GuestOffset, content: Content) -> Result<()> {
        match content {
            Content::Unallocated => match &self.image.header().backing {
                Some(backing) => return Err(Error::NeedsBacking { name: backing.name.clone(), guest }),
                None => part.fill(0),
            },
            Content::Zero => part.fill(0),
            Content::Data(HostOffset(host)) => self.image.read_data(part, HostOffset(host))?,
            Content::Compressed { cluster, data } => {
                let bytes = self.clusters.read(self.image, cluster, data)?;
                let start = to_usize(guest.0 - cluster.0);
                part.copy_from_slice(bytes.get(start..start + part.len()).unwrap_or_default());
            }
        }
        Ok(())
    }
}
