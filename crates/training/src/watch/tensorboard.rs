//! Event files of TensorBoard: records of protocol buffers, each with checksums.
//!
//! Formats: TensorFlow's `tfrecord` (length, masked CRC-32C of it, data, masked CRC-32C of that), `event.proto`,
//! `summary.proto`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// A file of events, written as they come.
#[derive(Debug)]
pub(super) struct EventFile {
    file: File,
}

impl EventFile {
    /// A new file in `folder`, whose readers forget what earlier files say of steps after `steps`.
    pub(super) fn create(folder: &Path, steps: u64) -> io::Result<Self> {
        let now = now();
        let name = format!("events.out.tfevents.{:010}.kiln", now as u64);
        let open = |suffix: usize| {
            let name = if suffix == 0 { name.clone() } else { format!("{name}.{suffix}") };
            OpenOptions::new().write(true).create_new(true).open(folder.join(name))
        };
        let taken = |file: &io::Result<File>| {
            file.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
        };
        let file = (0..1000).map(open).find(|file| !taken(file)).unwrap_or_else(|| open(0))?;
        let mut events = Self { file };
        events.write(&event(now, 0, Content::Version))?;
        events.write(&event(now, steps + 1, Content::Start))?;
        Ok(events)
    }

    pub(super) fn scalars(&mut self, steps: u64, scalars: &[(&str, f64)]) -> io::Result<()> {
        let now = now();
        let records = scalars
            .iter()
            .flat_map(|(tag, value)| record(&event(now, steps, Content::Scalar(tag, *value as f32))));
        self.file.write_all(&records.collect::<Vec<u8>>())
    }

    fn write(&mut self, event: &[u8]) -> io::Result<()> {
        self.file.write_all(&record(event))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

enum Content<'a> {
    /// Of the format.
    Version,
    /// A run begins again: later steps of earlier files don't count.
    Start,
    Scalar(&'a str, f32),
}

/// An `Event`: `wall_time` 1, `step` 2, `file_version` 3, `summary` 5, `session_log` 7.
fn event(time: f64, step: u64, content: Content) -> Vec<u8> {
    let mut event = vec![1 << 3 | FIXED_64];
    event.extend(time.to_le_bytes());
    if step > 0 {
        event.push(2 << 3 | VARINT);
        varint(&mut event, step);
    }
    match content {
        Content::Version => bytes(&mut event, 3, b"brain.Event:2"),
        // `status` 1 is `START` 1.
        Content::Start => bytes(&mut event, 7, &[1 << 3 | VARINT, 1]),
        Content::Scalar(tag, value) => {
            // A `Summary` with one `Value`: `tag` 1, `simple_value` 2.
            let mut found = Vec::new();
            bytes(&mut found, 1, tag.as_bytes());
            found.push(2 << 3 | FIXED_32);
            found.extend(value.to_le_bytes());
            let mut summary = Vec::new();
            bytes(&mut summary, 1, &found);
            bytes(&mut event, 5, &summary);
        }
    }
    event
}

const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const BYTES: u8 = 2;
const FIXED_32: u8 = 5;

fn bytes(to: &mut Vec<u8>, field: u8, content: &[u8]) {
    to.push(field << 3 | BYTES);
    varint(to, content.len() as u64);
    to.extend(content);
}

fn varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(data);
    record.extend(masked(crc32c(data)).to_le_bytes());
    record
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Castagnoli's polynomial, bit by bit: a record has some fifty bytes.
fn crc32c(data: &[u8]) -> u32 {
    const REVERSED: u32 = 0x82f6_3b78;
    let mut crc = !0;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { REVERSED } else { 0 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_those_of_tensorboards_writer() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/training/events.tfevents");
        const START: f64 = 1.7e9;
        let events = [
            event(START + 0.25, 0, Content::Version),
            event(START + 0.25, 3, Content::Start),
            event(START + 1.5, 3, Content::Scalar("train/loss", 2.5)),
            event(START + 2.0, 300, Content::Scalar("train/learning_rate", 1e-4)),
            event(START + 3.0, 70000, Content::Scalar("held_out/loss", 0.0)),
        ];
        let found: Vec<u8> = events.iter().flat_map(|event| record(event)).collect();
        assert_eq!(found, std::fs::read(path).unwrap());
    }

    #[test]
    fn files_of_the_same_second_have_names_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            EventFile::create(folder.path(), 0).unwrap();
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
        assert!(EventFile::create(&folder.path().join("none"), 0).is_err());
    }
}
