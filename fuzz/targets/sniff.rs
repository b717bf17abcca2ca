#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| sheer_core::fuzzing::sniff(input));
