#![no_main]

#[path = "../bodies/read_image.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::read_image(bytes));
