//! The software CPU: how many threads do the work of a machine's CPUs.

/// The first release in which a CPU may translate code that another one is writing (its "accel/tcg: Always lock pages before
/// translation").
///
/// Before it, what was translated of the old bytes may stay for good. Linux changes its own code while other CPUs run it
/// (static keys): it puts a breakpoint first, and a CPU that keeps that one traps at it for ever, without a word. Of six guests that
/// switched such a key again and again beside a busy CPU each stood still within a thousand rounds.
const SAFE: (u32, u32) = (8, 1);

/// The value of `-accel`, for the QEMU that calls itself `program`. It has room for 256 MiB of translated code.
pub fn accelerator(cpus: u32, program: &str) -> &'static str {
    if cpus > 1 && release(program).is_none_or(|release| release < SAFE) {
        // One after another; a CPU that waits for another one gives way to it.
        "tcg,thread=single,tb-size=256"
    } else {
        "tcg,thread=multi,tb-size=256"
    }
}

/// The numbers in `QEMU emulator version 7.2.22 (Debian …)`.
fn release(program: &str) -> Option<(u32, u32)> {
    let mut words = program.split_whitespace().skip_while(|word| *word != "version").skip(1);
    let mut numbers = words.next()?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_cpus_have_a_thread_each_only_where_they_may_translate_what_others_write() {
        let old = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)";
        let fixed =
            ["QEMU emulator version 8.1.0", "QEMU emulator version 10.0.3 (Debian 1:10.0.3+ds-0+deb13u1)"];
        for unsafe_one in [old, "QEMU emulator version 8.0.5", "QEMU emulator version", "something else", ""]
        {
            assert_eq!(accelerator(2, unsafe_one), "tcg,thread=single,tb-size=256", "{unsafe_one}");
            assert_eq!(accelerator(1, unsafe_one), "tcg,thread=multi,tb-size=256", "{unsafe_one}");
        }
        for safe_one in fixed {
            assert_eq!(accelerator(2, safe_one), "tcg,thread=multi,tb-size=256", "{safe_one}");
        }
    }
}
