//! Changes to files: bytes, numbers, and what JSON and templates are made of.

/// Xorshift, so that a run is repeated by its seed.
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`, 0 if that is 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit.max(1)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Whole numbers at which something changes.
const NUMBERS: [&str; 14] = [
    "0",
    "1",
    "-1",
    "2",
    "7",
    "127",
    "255",
    "256",
    "65536",
    "2147483647",
    "4294967296",
    "9223372036854775807",
    "18446744073709551616",
    "1e308",
];
/// What stands in configurations, headers, templates and logs.
const WORDS: [&str; 40] = [
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "[[[[",
    "\"type\"",
    "\"Sequence\"",
    "\"Replace\"",
    "\"Split\"",
    "\"Regex\"",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "NaN",
    "\\u0000",
    "\u{1f40b}",
    "\"r\"",
    "\"alpha_pattern\"",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% set x = x ~ x %}",
    "{% if x %}",
    "{% endif %}",
    "{{ x | tojson }}",
    "{{ range(99999) | list }}",
    "{% macro m(x) %}",
    "{% endmacro %}",
    "{{ m(m) }}",
    "-%}",
    "{#",
    "{% set ns.x = ns %}",
    "namespace(x=1)",
    ".replace('a', 'aaaa')",
    "| join(x)",
    "*",
    "[:]",
    "(?=a)",
    "\\s+",
    "a*",
];

/// Some changes to `bytes`; `other` is another file of the kind, of which parts may come in.
pub(crate) fn mutated(bytes: &[u8], other: &[u8], draw: &mut Draw) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + draw.below(6) {
        let place = draw.below(bytes.len() + 1);
        let most = 1 << draw.below(8);
        let length = 1 + draw.below(most);
        let end = (place + length).min(bytes.len());
        match draw.below(12) {
            0 if place < bytes.len() => bytes[place] ^= 1 << draw.below(8),
            1 if place < bytes.len() => bytes[place] = draw.below(256) as u8,
            2 => drop(bytes.drain(place..end)),
            3 => {
                let part = bytes[place..end].to_vec();
                bytes.splice(place..place, part);
            }
            4 => {
                let from = draw.below(other.len() + 1);
                let part = other[from..(from + length).min(other.len())].to_vec();
                bytes.splice(place..end, part);
            }
            5 => bytes.truncate(place),
            // A number in text.
            6 | 7 => {
                let is_digit = |byte: &u8| byte.is_ascii_digit();
                if let Some(start) = bytes[place..].iter().position(is_digit).map(|start| start + place) {
                    let count = bytes[start..].iter().take_while(|byte| is_digit(byte)).count();
                    bytes.splice(start..start + count, draw.pick(&NUMBERS).bytes());
                }
            }
            // A number in binary.
            8 => {
                let number = draw
                    .pick(&[0u64, 1, 255, 1 << 16, 1 << 31, 0xffff_ffff, 1 << 40, 1 << 62, u64::MAX])
                    .to_le_bytes();
                let size = *draw.pick(&[2, 4, 8]);
                let number = &number[..size];
                let end = (place + size).min(bytes.len());
                bytes.splice(place..end, number.iter().copied());
            }
            9 | 10 => {
                let word = draw.pick(&WORDS).bytes();
                bytes.splice(place..if draw.below(2) == 0 { place } else { end }, word);
            }
            _ => {
                let part = bytes[place..end].to_vec();
                let again = part.repeat(draw.below(200));
                bytes.splice(place..place, again);
            }
        }
    }
    bytes
}
