#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| sheer_proxy::fuzzing::question(input));
