"""Issue system calls from machine code of our own, the way an attacker's native code would.

Runs in the host test process first: importing this module maps one page of machine code. A compartment is forked from
that process and inherits the page, because nothing inside may map executable memory any more. No libc wrapper stands
between an attempt and the kernel: what comes back is the kernel's own answer, a result or a negative errno.

x86-64 only; the numbers are those of the kernel's asm/unistd_64.h and asm/unistd_32.h.
"""

import ctypes
import errno
import mmap
import os
import platform

if platform.machine() != "x86_64":
    raise ImportError("the escape suite's machine code is x86-64")

# One syscall instruction. The kernel takes rdi rsi rdx r10 r8 r9, C hands over rdi (the number) rsi rdx rcx r8 r9 [rsp+8].
_LOAD_ARGUMENTS = bytes.fromhex(
    "4889f8"  # mov rax, rdi
    "4889f7"  # mov rdi, rsi
    "4889d6"  # mov rsi, rdx
    "4889ca"  # mov rdx, rcx
    "4d89c2"  # mov r10, r8
    "4d89c8"  # mov r8, r9
    "4c8b4c2408"  # mov r9, [rsp+8]
    "0f05"  # syscall
)
_SYSCALL = _LOAD_ARGUMENTS + b"\xc3"  # ret

# The same, but whoever comes back with 0 (the child of a fork, vfork or clone) exits at once and touches no stack:
# vfork and CLONE_VM children share the caller's.
_SPAWN = _LOAD_ARGUMENTS + bytes.fromhex(
    "4885c0"  # test rax, rax
    "7401"  # jz child
    "c3"  # ret
    "31ff"  # child: xor edi, edi
    "b83c000000"  # mov eax, 60 (exit, of this thread alone)
    "0f05"  # syscall
)

# The same, but the child waits for ever. It needs no stack and no memory of its own: the cheapest thread there is.
_PARK = _LOAD_ARGUMENTS + bytes.fromhex(
    "4885c0"  # test rax, rax
    "7401"  # jz child
    "c3"  # ret
    "b822000000"  # child: mov eax, 34 (pause)
    "0f05"  # syscall
    "ebf7"  # jmp child
)

# The i386 entry: eax = number, ebx ecx edx esi edi; rbx is the caller's to keep.
_INT80 = bytes.fromhex(
    "53"  # push rbx
    "89f8"  # mov eax, edi
    "89f3"  # mov ebx, esi
    "4189d2"  # mov r10d, edx
    "4489cf"  # mov edi, r9d
    "4489c6"  # mov esi, r8d
    "89ca"  # mov edx, ecx
    "4489d1"  # mov ecx, r10d
    "cd80"  # int 0x80
    "4898"  # cdqe
    "5b"  # pop rbx
    "c3"  # ret
)

# A page that is executable from birth and never writable again; kept for as long as the module lives. Private: shared
# memory of the host is not there inside.
_page = mmap.mmap(
    -1,
    mmap.PAGESIZE,
    flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
    prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,
)
_offsets = {}
for _name, _code in (("syscall", _SYSCALL), ("spawn", _SPAWN), ("park", _PARK), ("int80", _INT80)):
    _offsets[_name] = _page.tell()
    _page.write(_code.ljust(64, b"\xcc"))
_base = ctypes.addressof(ctypes.c_char.from_buffer(_page))
_libc = ctypes.CDLL(None, use_errno=True)
if _libc.mprotect(ctypes.c_void_p(_base), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC) != 0:
    raise OSError(ctypes.get_errno(), "mprotect of the machine code")

_SIX = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 7)
_FIVE = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 6)
_syscall = _SIX(_base + _offsets["syscall"])
_spawn = _SIX(_base + _offsets["spawn"])
_park = _SIX(_base + _offsets["park"])
_int80 = _FIVE(_base + _offsets["int80"])


def code_address() -> int:
    """Where the page of machine code lies: memory that is executable already, for attempts on mprotect."""
    return _base


def syscall(number: int, *arguments: object) -> int:
    """One system call. Arguments: int, None (0), bytes, paths and ctypes objects (their address). Result or -errno."""
    kept, words = _words(arguments, 6)
    answer = _syscall(number, *words)
    del kept
    return answer


def spawn(number: int, *arguments: object) -> int:
    """One system call whose child, if it makes one, exits at once with status 0. Result (a pid) or -errno."""
    kept, words = _words(arguments, 6)
    answer = _spawn(number, *words)
    del kept
    return answer


def park(number: int, *arguments: object) -> int:
    """One system call whose child, if it makes one, waits until it is killed. Result (an id) or -errno."""
    kept, words = _words(arguments, 6)
    answer = _park(number, *words)
    del kept
    return answer


def int80(number: int, *arguments: int) -> int:
    """One system call through the i386 entry, with i386 numbers and 32-bit arguments. Result or -errno."""
    kept, words = _words(arguments, 5)
    answer = _int80(number, *words)
    del kept
    return answer


def checked(answer: int) -> int:
    """The answer of one of the above, or the OSError that it stands for."""
    if -4096 < answer < 0:
        raise OSError(-answer, f"{errno.errorcode.get(-answer, '?')} from the kernel")
    return answer


def call(name: str, *arguments: object) -> int:
    """The system call of that name, from machine code. Raises the OSError that the kernel's answer stands for."""
    return checked(syscall(NUMBERS[name], *arguments))


def _words(arguments: tuple[object, ...], count: int) -> tuple[list[object], list[int]]:
    """Machine words for the arguments, and the objects that must stay alive for as long as the words are used."""
    if len(arguments) > count:
        raise TypeError(f"at most {count} arguments")
    kept: list[object] = []
    words: list[int] = []
    for argument in arguments:
        if argument is None:
            words.append(0)
        elif isinstance(argument, int):
            words.append(argument)
        elif isinstance(argument, (bytes, str, os.PathLike)):
            raw = argument if isinstance(argument, bytes) else os.fsencode(argument)
            buffer = ctypes.create_string_buffer(raw)
            kept.append(buffer)
            words.append(ctypes.addressof(buffer))
        else:
            kept.append(argument)
            words.append(ctypes.addressof(argument))  # type: ignore[arg-type]
    return kept, words + [0] * (count - len(words))


# asm/unistd_64.h, written down here a second time on purpose: compart's own table is one of the things under test.
_RUNS = {
    0: """
    read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
    rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise
    shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm setitimer getpid sendfile socket connect accept
    sendto recvfrom sendmsg recvmsg shutdown bind listen getsockname getpeername socketpair setsockopt getsockopt
    clone fork vfork execve exit wait4 kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl
    flock fsync fdatasync truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink
    symlink readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo times ptrace
    getuid syslog getgid setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid setregid getgroups
    setgroups setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid getsid capget capset rt_sigpending
    rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime mknod uselib personality ustat statfs fstatfs
    sysfs getpriority setpriority sched_setparam sched_getparam sched_setscheduler sched_getscheduler
    sched_get_priority_max sched_get_priority_min sched_rr_get_interval mlock munlock mlockall munlockall vhangup
    modify_ldt pivot_root _sysctl prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2
    swapon swapoff reboot sethostname setdomainname iopl ioperm create_module init_module delete_module
    get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security gettid readahead
    setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
    lremovexattr fremovexattr tkill time futex sched_setaffinity sched_getaffinity set_thread_area io_setup
    io_destroy io_getevents io_submit io_cancel get_thread_area lookup_dcookie epoll_create epoll_ctl_old
    epoll_wait_old remap_file_pages getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create
    timer_settime timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres
    clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy get_mempolicy
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load waitid add_key request_key
    keyctl ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch migrate_pages openat mkdirat
    mknodat fchownat futimesat newfstatat unlinkat renameat linkat symlinkat readlinkat fchmodat faccessat
    pselect6 ppoll unshare set_robust_list get_robust_list splice tee sync_file_range vmsplice move_pages
    utimensat epoll_pwait signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4
    signalfd4 eventfd2 epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open
    recvmmsg fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs
    sendmmsg setns getcpu process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr
    renameat2 seccomp getrandom memfd_create kexec_file_load bpf execveat userfaultfd membarrier mlock2
    copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq uretprobe uprobe
    """,
    424: """
    pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig fsmount
    fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2 mount_setattr
    quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret process_mrelease
    futex_waitv set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue
    statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat
    listxattrat removexattrat open_tree_attr file_getattr file_setattr
    """,
}
NUMBERS: dict[str, int] = {name: first + at for first, run in _RUNS.items() for at, name in enumerate(run.split())}
