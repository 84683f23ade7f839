//! Activations of all calibration windows at one place of the model, in memory or on disk.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use burn::tensor::{Device, Tensor};

use crate::{Error, Result, values::tensor};

/// Where streams are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Store {
    Memory,
    /// As nameless temporary files of this folder.
    Folder(PathBuf),
}

/// One matrix `[rows, width]` for each window.
#[derive(Debug)]
pub(crate) struct Stream {
    shape: [usize; 2],
    windows: Windows,
}

#[derive(Debug)]
enum Windows {
    Memory(Vec<Vec<f32>>),
    Disk { file: File, folder: PathBuf, count: usize },
}

impl Stream {
    pub(crate) fn new(store: &Store, shape: [usize; 2]) -> Result<Self> {
        let windows = match store {
            Store::Memory => Windows::Memory(Vec::new()),
            Store::Folder(folder) => {
                let file = tempfile::tempfile_in(folder).map_err(Error::io(folder))?;
                Windows::Disk { file, folder: folder.clone(), count: 0 }
            }
        };
        Ok(Self { shape, windows })
    }

    /// Windows in the stream.
    pub(crate) fn len(&self) -> usize {
        match &self.windows {
            Windows::Memory(windows) => windows.len(),
            Windows::Disk { count, .. } => *count,
        }
    }

    /// `[rows, width]` of each window.
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Writes window `window`, which may be the first that isn't there yet.
    pub(crate) fn set(&mut self, window: usize, values: Vec<f32>) -> Result<()> {
        assert!(
            values.len() == self.shape[0] * self.shape[1] && window <= self.len(),
            "a window of the stream"
        );
        match &mut self.windows {
            Windows::Memory(windows) if window == windows.len() => windows.push(values),
            Windows::Memory(windows) => windows[window] = values,
            Windows::Disk { file, folder, count } => {
                let start = SeekFrom::Start((window * values.len() * 4) as u64);
                file.seek(start)
                    .and_then(|_| file.write_all(&to_bytes(&values)))
                    .map_err(|error| Error::io(folder.as_path())(error))?;
                *count = (*count).max(window + 1);
            }
        }
        Ok(())
    }

    /// The values of one window.
    pub(crate) fn get(&self, window: usize) -> Result<Vec<f32>> {
        let size = self.shape[0] * self.shape[1];
        match &self.windows {
            Windows::Memory(windows) => Ok(windows[window].clone()),
            Windows::Disk { file, folder, .. } => {
                let (mut bytes, mut file) = (vec![0; size * 4], file);
                file.seek(SeekFrom::Start((window * bytes.len()) as u64))
                    .and_then(|_| file.read_exact(&mut bytes))
                    .map_err(|error| Error::io(folder.as_path())(error))?;
                Ok(from_bytes(&bytes))
            }
        }
    }

    /// One window as `[rows, width]`, outside autodiff.
    pub(crate) fn tensor(&self, window: usize, device: &Device) -> Result<Tensor<2>> {
        let shape = self.shape;
        Ok(tensor(self.get(window)?, shape, device))
    }

    /// One window as bytes.
    pub(crate) fn bytes(&self, window: usize) -> Result<Vec<u8>> {
        Ok(to_bytes(&self.get(window)?))
    }

    /// [`set`](Self::set) of what [`bytes`](Self::bytes) gave.
    pub(crate) fn set_bytes(&mut self, window: usize, bytes: &[u8]) -> Result<()> {
        let [rows, width] = self.shape;
        if bytes.len() != rows * width * 4 {
            let expected = format!("{rows} rows of {width} values");
            return Err(Error::argument(
                format!("window {window}"),
                expected,
                format!("{} bytes", bytes.len()),
            ));
        }
        self.set(window, from_bytes(bytes))
    }

    /// Appends all windows to a file.
    pub(crate) fn write(&self, file: &mut impl Write, path: &Path) -> Result<()> {
        for window in 0..self.len() {
            file.write_all(&self.bytes(window)?).map_err(Error::io(path))?;
        }
        Ok(())
    }

    /// Reads `count` windows that [`write`](Self::write) wrote.
    pub(crate) fn read(
        store: &Store,
        shape: [usize; 2],
        count: usize,
        file: &mut impl Read,
        path: &Path,
    ) -> Result<Self> {
        let mut stream = Self::new(store, shape)?;
        let mut bytes = vec![0; shape[0] * shape[1] * 4];
        for window in 0..count {
            file.read_exact(&mut bytes).map_err(Error::io(path))?;
            stream.set(window, from_bytes(&bytes))?;
        }
        Ok(stream)
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_disk_hold_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let windows: Vec<Vec<f32>> = (0..4).map(|seed| kiln_testkit::values(seed, 15)).collect();
        let fill = |store: &Store| {
            let mut stream = Stream::new(store, [3, 5]).unwrap();
            for (index, window) in windows.iter().enumerate() {
                stream.set(index, window.clone()).unwrap();
            }
            stream.set(1, windows[3].clone()).unwrap();
            stream
        };
        for store in [Store::Memory, Store::Folder(folder.path().into())] {
            let stream = fill(&store);
            assert_eq!(stream.len(), 4);
            assert_eq!(stream.get(1).unwrap(), windows[3]);
            assert_eq!(stream.get(2).unwrap(), windows[2]);
            let mut bytes = Vec::new();
            stream.write(&mut bytes, Path::new("f")).unwrap();
            let again = Stream::read(&store, [3, 5], 4, &mut bytes.as_slice(), Path::new("f")).unwrap();
            assert_eq!(again.get(0).unwrap(), windows[0]);
            assert!(Stream::read(&store, [3, 5], 5, &mut bytes.as_slice(), Path::new("f")).is_err());
        }
        // Spilled streams leave no files.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
