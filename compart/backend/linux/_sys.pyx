# cython: language_level=3
"""One function per Linux system call, named after it. No policy, nothing of compart is imported.

Runs in the host and, between fork and wall, in the child. Every function raises OSError on failure and
says in its first line which manual page it speaks for.
"""

import os

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/audit.h>
    #include <linux/filter.h>
    #include <linux/seccomp.h>
    #include <malloc.h>
    #include <poll.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/mount.h>
    #include <sys/prctl.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/time.h>
    #include <sys/uio.h>
    #include <sys/wait.h>
    #include <time.h>
    #include <ucontext.h>
    #include <unistd.h>

    /* Numbers newer than the oldest headers compart builds against. All but clone and friends share one
       number on every architecture since 5.0 (asm-generic/unistd.h). */
    #ifndef SYS_pidfd_send_signal
    #define SYS_pidfd_send_signal 424
    #endif
    #ifndef SYS_open_tree
    #define SYS_open_tree 428
    #define SYS_move_mount 429
    #define SYS_fsopen 430
    #define SYS_fsconfig 431
    #define SYS_fsmount 432
    #endif
    #ifndef SYS_close_range
    #define SYS_close_range 436
    #endif
    #ifndef SYS_openat2
    #define SYS_openat2 437
    #endif
    #ifndef SYS_mount_setattr
    #define SYS_mount_setattr 442
    #endif
    #ifndef SYS_landlock_create_ruleset
    #define SYS_landlock_create_ruleset 444
    #define SYS_landlock_add_rule 445
    #define SYS_landlock_restrict_self 446
    #endif
    #ifndef CLONE_PIDFD
    #define CLONE_PIDFD 0x00001000
    #endif
    #ifndef P_PIDFD
    #define P_PIDFD 3
    #endif
    #ifndef __WALL
    #define __WALL 0x40000000
    #endif
    #ifndef SECCOMP_ADDFD_FLAG_SEND
    #define SECCOMP_ADDFD_FLAG_SEND 2
    #endif

    struct compart_landlock_ruleset { uint64_t fs, net, scoped; };
    struct compart_landlock_path { uint64_t access; int32_t fd; } __attribute__((packed));
    struct compart_open_how { uint64_t flags, mode, resolve; };
    struct compart_mount_attr { uint64_t set, clr, propagation, userns_fd; };
    struct compart_cap_header { uint32_t version; int pid; };
    struct compart_cap_data { uint32_t effective, permitted, inheritable; };

    /* ---- fork without an exit signal -------------------------------------------------------------------
       libc's fork() runs pthread_atfork handlers and makes malloc's locks good in the child; both matter
       (OpenBLAS re-creates its threads in such a handler). But it asks for SIGCHLD, and an application must
       not see ours. Syscall User Dispatch (Linux 5.11, prctl(2)) lets this one thread look at the system
       calls libc makes inside fork(): the clone is repeated with CLONE_PIDFD and exit signal 0, everything
       else unchanged. Where the kernel lacks it, a bare clone is made; then handlers of pthread_atfork do not
       run. */
    #ifndef PR_SET_SYSCALL_USER_DISPATCH
    #define PR_SET_SYSCALL_USER_DISPATCH 59
    #endif

    static int compart_pidfd;

    static long compart_bare_clone(void)
    {
        compart_pidfd = -1;
    #if defined(__x86_64__)
        return syscall(SYS_clone, CLONE_PIDFD, NULL, &compart_pidfd, NULL, 0);
    #else
        return syscall(SYS_clone, CLONE_PIDFD, NULL, &compart_pidfd, 0, NULL);
    #endif
    }

    #if defined(__x86_64__) && defined(__linux__)
    #define COMPART_DISPATCH 1
    long compart_raw(long nr, long a, long b, long c, long d, long e, long f) __attribute__((visibility("hidden")));
    void compart_restorer(void) __attribute__((visibility("hidden")));
    extern char compart_range_start[] __attribute__((visibility("hidden")));
    extern char compart_range_end[] __attribute__((visibility("hidden")));
    /* The only instructions whose system calls are not dispatched: the handler's own, and its return. */
    __asm__(
        ".pushsection .text\\n"
        ".hidden compart_range_start\\n.globl compart_range_start\\ncompart_range_start:\\n"
        ".hidden compart_raw\\n.globl compart_raw\\n.type compart_raw,@function\\ncompart_raw:\\n"
        "  movq %rdi,%rax\\n  movq %rsi,%rdi\\n  movq %rdx,%rsi\\n  movq %rcx,%rdx\\n"
        "  movq %r8,%r10\\n  movq %r9,%r8\\n  movq 8(%rsp),%r9\\n  syscall\\n  ret\\n"
        ".hidden compart_restorer\\n.globl compart_restorer\\n.type compart_restorer,@function\\n"
        "  nop\\ncompart_restorer:\\n  movq $15,%rax\\n  syscall\\n  hlt\\n"
        ".hidden compart_range_end\\n.globl compart_range_end\\ncompart_range_end:\\n"
        ".popsection\\n");

    struct compart_ksigaction {
        void (*handler)(int, siginfo_t *, void *);
        unsigned long flags;
        void (*restorer)(void);
        uint64_t mask;
    };

    static volatile char compart_selector; /* 0 = allow, 1 = dispatch */

    static void compart_on_dispatch(int sig, siginfo_t *info, void *context)
    {
        greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
        long nr = r[REG_RAX], result;
        (void)sig; (void)info;
        if (nr == SYS_clone && (r[REG_RDI] & 0xff) == SIGCHLD && !(r[REG_RDI] & CLONE_VM)) {
            compart_selector = 0;
            result = compart_raw(SYS_clone, (r[REG_RDI] & ~0xffL) | CLONE_PIDFD, r[REG_RSI],
                                 (long)&compart_pidfd, r[REG_R10], r[REG_R8], 0);
        } else if (nr == SYS_fork) {
            compart_selector = 0;
            result = compart_raw(SYS_clone, CLONE_PIDFD, 0, (long)&compart_pidfd, 0, 0, 0);
        } else {
            result = compart_raw(nr, r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]);
        }
        r[REG_RAX] = result;
    }

    static int compart_dispatch_works = -1;

    static long compart_clone(void)
    {
        struct compart_ksigaction ours, old;
        sigset_t unblock, before;
        long pid;
        int failed;
        if (compart_dispatch_works == 0)
            return compart_bare_clone();
        memset(&ours, 0, sizeof ours);
        ours.handler = compart_on_dispatch;
        ours.flags = SA_SIGINFO | SA_NODEFER | 0x04000000 /* SA_RESTORER */;
        ours.restorer = compart_restorer;
        ours.mask = 0;
        if (syscall(SYS_rt_sigaction, SIGSYS, &ours, &old, 8) != 0)
            return compart_bare_clone();
        sigemptyset(&unblock);
        sigaddset(&unblock, SIGSYS);
        pthread_sigmask(SIG_UNBLOCK, &unblock, &before);
        compart_selector = 0;
        compart_pidfd = -1;
        if (prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, compart_range_start,
                  (unsigned long)(compart_range_end - compart_range_start), &compart_selector) != 0) {
            compart_dispatch_works = 0;
            syscall(SYS_rt_sigaction, SIGSYS, &old, NULL, 8);
            pthread_sigmask(SIG_SETMASK, &before, NULL);
            return compart_bare_clone();
        }
        compart_dispatch_works = 1;
        compart_selector = 1;
        pid = fork();
        compart_selector = 0;
        failed = errno;
        if (pid != 0)   /* the kernel switches dispatch off in a forked child */
            prctl(PR_SET_SYSCALL_USER_DISPATCH, 0, 0, 0, 0);
        syscall(SYS_rt_sigaction, SIGSYS, &old, NULL, 8);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        errno = failed;
        return pid;
    }
    #else
    static int compart_dispatch_works = 0;
    static long compart_clone(void) { return compart_bare_clone(); }
    #endif

    /* ---- fstat for libcs that say newfstatat(fd, "", AT_EMPTY_PATH) --------------------------------------
       glibc 2.33 to 2.38 make fstat(3) that way. A filter cannot see that the path is empty, so the call is
       refused with RET_TRAP and repeated here as fstat(2), which takes no path. Anything with a path is
       repeated without the flag, which the filter refuses for good and reports. */
    #ifndef AT_EMPTY_PATH
    #define AT_EMPTY_PATH 0x1000
    #endif
    static int compart_names_nothing(const char *path)
    {
        unsigned char resident;
        if (path == NULL)
            return 1;
        /* The kernel would answer EFAULT for memory that is not there. */
        if (syscall(SYS_mincore, (void *)((uintptr_t)path & ~(uintptr_t)4095), 1, &resident) != 0)
            return 0;
        return *path == 0;
    }

    #if defined(__x86_64__)
    static void compart_on_trap(int sig, siginfo_t *info, void *context)
    {
        greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
        int kept = errno;
        (void)sig;
        if (info->si_code != 1 /* SYS_SECCOMP */)
            return;
        if (info->si_syscall == SYS_newfstatat) {
            const char *path = (const char *)r[REG_RSI];
            if ((r[REG_R10] & AT_EMPTY_PATH) && compart_names_nothing(path))
                r[REG_RAX] = compart_raw(SYS_fstat, (int)r[REG_RDI], r[REG_RDX], 0, 0, 0, 0);
            else
                r[REG_RAX] = compart_raw(SYS_newfstatat, r[REG_RDI], r[REG_RSI], r[REG_RDX],
                                         r[REG_R10] & ~(long)AT_EMPTY_PATH, 0, 0);
        } else {
            r[REG_RAX] = -EPERM;
        }
        errno = kept;
    }
    #elif defined(__aarch64__)
    static void compart_on_trap(int sig, siginfo_t *info, void *context)
    {
        mcontext_t *m = &((ucontext_t *)context)->uc_mcontext;
        int kept = errno;
        long result = -EPERM;
        (void)sig;
        if (info->si_code != 1 /* SYS_SECCOMP */)
            return;
        if (info->si_syscall == SYS_newfstatat) {
            const char *path = (const char *)m->regs[1];
            if ((m->regs[3] & AT_EMPTY_PATH) && compart_names_nothing(path))
                result = syscall(SYS_fstat, (int)m->regs[0], m->regs[2]);
            else
                result = syscall(SYS_newfstatat, m->regs[0], m->regs[1], m->regs[2],
                                 m->regs[3] & ~(unsigned long)AT_EMPTY_PATH);
            if (result == -1)
                result = -errno;
        }
        m->regs[0] = (unsigned long)result;
        errno = kept;
    }
    #endif

    static int compart_install_trap(void)
    {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = compart_on_trap;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
        return sigaction(SIGSYS, &action, NULL);
    }

    /* ---- signals ------------------------------------------------------------------------------------------ */
    static void compart_block_signals(sigset_t *before)
    {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, before);
    }

    static void compart_default_signals(void)
    {
        struct sigaction now, fresh;
        sigset_t none;
        int n;
        memset(&fresh, 0, sizeof fresh);
        fresh.sa_handler = SIG_DFL;
        for (n = 1; n < 65; n++) {
            if (sigaction(n, NULL, &now) != 0)
                continue;
            if (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN)
                sigaction(n, &fresh, NULL);
        }
        /* Ctrl-C goes to the whole foreground group; the host decides what becomes of us. */
        fresh.sa_handler = SIG_IGN;
        sigaction(SIGINT, &fresh, NULL);
        sigaction(SIGPIPE, &fresh, NULL);
        sigemptyset(&none);
        pthread_sigmask(SIG_SETMASK, &none, NULL);
    }

    /* ---- shared mappings that a fork would hand over ---------------------------------------------------------
       A MAP_SHARED mapping of the host (numpy.memmap, shared_memory, an io_uring ring) is authority: writing
       to it reaches the host's files and memory. Every one that can be written, or made writable, is
       replaced by an inaccessible private one at the same address. PROCMAP_QUERY (Linux 6.11) finds them in
       one call each; else /proc/self/maps is read. Returns how many were replaced, or -1. */
    struct compart_procmap_query {
        uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
        uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
        uint64_t vma_name_addr, build_id_addr;
    };
    #define COMPART_PROCMAP_QUERY _IOWR('f', 17, struct compart_procmap_query)

    static int compart_drop_one(uint64_t start, uint64_t end)
    {
        size_t length = (size_t)(end - start);
        void *at = (void *)(uintptr_t)start;
        /* A read-only mapping of a read-only description cannot be made writable and stays: glibc's
           gconv cache is one. */
        if (mprotect(at, length, PROT_READ | PROT_WRITE) != 0 && errno == EACCES) {
            return 0;
        }
        if (mmap(at, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            return -1;
        return 1;
    }

    static int compart_drop_shared(void)
    {
        struct compart_procmap_query q;
        uint64_t at = 0;
        int dropped = 0, one, fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return -1;
        for (;;) {
            memset(&q, 0, sizeof q);
            q.size = sizeof q;
            q.query_flags = 0x10 | 0x08;   /* covering or next, shared */
            q.query_addr = at;
            if (ioctl(fd, COMPART_PROCMAP_QUERY, &q) != 0)
                break;
            one = compart_drop_one(q.vma_start, q.vma_end);
            if (one < 0) { close(fd); return -1; }
            dropped += one;
            at = q.vma_end;
        }
        if (errno == ENOENT) {
            close(fd);
            return dropped;
        }
        {   /* an older kernel: read the text; start over after each change, as it moves the file's contents */
            FILE *text = fdopen(fd, "r");
            char line[1024];
            unsigned long long start, end;
            char perms[8];
            uint64_t starts[4096], ends[4096];
            int found = 0, i;
            if (text == NULL) { close(fd); return -1; }
            while (fgets(line, sizeof line, text) != NULL) {
                if (sscanf(line, "%llx-%llx %4s", &start, &end, perms) == 3 && perms[3] == 's') {
                    if (found == 4096) { fclose(text); errno = E2BIG; return -1; }
                    starts[found] = start;
                    ends[found++] = end;
                }
            }
            fclose(text);
            for (i = 0; i < found; i++) {
                one = compart_drop_one(starts[i], ends[i]);
                if (one < 0) return -1;
                dropped += one;
            }
        }
        return dropped;
    }

    static int compart_heap_lives(void)
    {
        /* Only after a bare clone beside other threads: one of them may have held a malloc lock at that
           moment, and it is held here for ever. SIGALRM's default action ends such a child; the host forks again. */
        struct itimerval soon = {{0, 0}, {0, 200000}}, never = {{0, 0}, {0, 0}};
        sigset_t only;
        signal(SIGALRM, SIG_DFL);
        sigemptyset(&only);
        sigaddset(&only, SIGALRM);
        pthread_sigmask(SIG_UNBLOCK, &only, NULL);
        setitimer(ITIMER_REAL, &soon, NULL);
    #if defined(__GLIBC__)
        (void)mallinfo2();
    #else
        free(malloc(64));
    #endif
        setitimer(ITIMER_REAL, &never, NULL);
        return 0;
    }

    /* RLIMIT_AS above what is in use now (proc(5) statm, getrlimit(2)); in C, as it is done in the child. */
    static int compart_limit_memory(unsigned long long budget)
    {
        char text[64];
        unsigned long long pages = 0;
        struct rlimit limit, now;
        ssize_t got;
        int i, fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return -1;
        got = read(fd, text, sizeof text);
        close(fd);
        if (got <= 0)
            return -1;
        for (i = 0; i < got && text[i] >= '0' && text[i] <= '9'; i++)
            pages = pages * 10 + (unsigned long long)(text[i] - '0');
        if (getrlimit(RLIMIT_AS, &now) != 0)
            return -1;
        limit.rlim_cur = pages * (unsigned long long)sysconf(_SC_PAGESIZE) + budget;
        if (now.rlim_max != RLIM_INFINITY && limit.rlim_cur > now.rlim_max)
            limit.rlim_cur = now.rlim_max;
        limit.rlim_max = limit.rlim_cur;
        return setrlimit(RLIMIT_AS, &limit);
    }

    static void compart_few_arenas(void)
    {
    #if defined(__GLIBC__)
        mallopt(M_ARENA_MAX, 1);
    #endif
    }

    static long compart_seccomp(unsigned op, unsigned flags, void *arg)
    {
        return syscall(SYS_seccomp, op, flags, arg);
    }

    /* seccomp(2) SECCOMP_SET_MODE_FILTER, then one byte "L" by the socket `control` with the listener, if the flags asked
       for one (sendmsg(2), SCM_RIGHTS); the listener is closed here. Without a program only the byte is sent. */
    static long compart_seccomp_tell(struct sock_filter *program, long count, unsigned flags, int control)
    {
        struct sock_fprog filter;
        union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } extra;
        char said = 'L';
        struct iovec part;
        struct msghdr message;
        struct cmsghdr *at;
        struct timespec moment = {0, 1000000};
        long listener = 0;
        int number, tries;
        filter.len = (unsigned short)count;
        filter.filter = program;
        if (count)
            listener = compart_seccomp(SECCOMP_SET_MODE_FILTER, flags, &filter);
        if (listener < 0)
            return -1;
        number = (int)listener;
        part.iov_base = &said;
        part.iov_len = 1;
        memset(&message, 0, sizeof message);
        memset(&extra, 0, sizeof extra);
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        if (number) {
            message.msg_control = &extra;
            message.msg_controllen = sizeof extra;
            at = CMSG_FIRSTHDR(&message);
            at->cmsg_level = SOL_SOCKET;
            at->cmsg_type = SCM_RIGHTS;
            at->cmsg_len = CMSG_LEN(sizeof number);
            memcpy(CMSG_DATA(at), &number, sizeof number);
        }
        /* ETOOMANYREFS (unix(7)): other descriptors of the same user are on their way somewhere; that passes. */
        for (tries = 0; sendmsg(control, &message, 0) != 1; tries++) {
            if (errno != ETOOMANYREFS || tries == 1000)
                return -1;
            nanosleep(&moment, NULL);
        }
        return number ? close(number) : 0;
    }

    /* fcntl(2) F_SETSIG: the kernel kills us when the last writer of a pipe is gone. */
    static long compart_die_with_writer(int pipe)
    {
        char byte;
        if (fcntl(pipe, F_SETOWN, getpid()) == -1 || fcntl(pipe, F_SETSIG, SIGKILL) == -1
            || fcntl(pipe, F_SETFL, O_NONBLOCK | O_ASYNC) == -1)
            return -1;
        if (read(pipe, &byte, 1) == 0)
            _exit(0);
        return 0;
    }

    /* The steps of a script that are more than one system call; script.py gives them their numbers. */
    static long compart_step(long step, long a, long b, long c, long d)
    {
        switch (step) {
        case -1:
            compart_default_signals();
            return 0;
        case -2:
            if (getppid() != (int)a)
                _exit(0);
            return 0;
        case -3:
            return compart_drop_shared();
        case -4:
            return compart_limit_memory((unsigned long long)a);
        case -5:
            /* glibc looks at the zone file again at each strftime() unless TZ still says what it has loaded; a program
               without TZ has loaded /etc/localtime (tzset(3)). */
            clearenv();
            return setenv("TZ", (const char *)a, 1);
        case -6:
            return compart_install_trap();
        case -7:
            return compart_seccomp_tell((struct sock_filter *)a, b, (unsigned)c, (int)d);
        case -8:
            return compart_die_with_writer((int)a);
        case -9:
            compart_few_arenas();
            return 0;
        default:
            errno = ENOSYS;
            return -1;
        }
    }
    #ifndef MADV_DONTFORK
    #define MADV_DONTFORK 10
    #endif
    """
    ctypedef unsigned long uint64_t
    ctypedef unsigned int uint32_t
    ctypedef struct sigset_t:
        pass
    ctypedef struct siginfo_t:
        int si_code
        int si_pid
        int si_status
    cdef struct timeval:
        long tv_sec
        long tv_usec
    cdef struct rusage:
        timeval ru_utime
        timeval ru_stime
        long ru_maxrss
        long ru_minflt
        long ru_majflt
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    cdef struct sock_filter:
        pass
    cdef struct sock_fprog:
        unsigned short len
        sock_filter *filter
    cdef struct seccomp_data:
        int nr
        uint32_t arch
        uint64_t instruction_pointer
        uint64_t args[6]
    cdef struct seccomp_notif:
        uint64_t id
        uint32_t pid
        uint32_t flags
        seccomp_data data
    cdef struct seccomp_notif_resp:
        uint64_t id
        long long val
        int error
        uint32_t flags
    cdef struct seccomp_notif_addfd:
        uint64_t id
        uint32_t flags
        uint32_t srcfd
        uint32_t newfd
        uint32_t newfd_flags
    cdef struct compart_landlock_ruleset:
        uint64_t fs
        uint64_t net
        uint64_t scoped
    cdef struct compart_landlock_path:
        uint64_t access
        int fd
    cdef struct compart_open_how:
        uint64_t flags
        uint64_t mode
        uint64_t resolve
    cdef struct compart_mount_attr:
        uint64_t set
        uint64_t clr
        uint64_t propagation
        uint64_t userns_fd
    cdef struct compart_cap_header:
        uint32_t version
        int pid
    cdef struct compart_cap_data:
        uint32_t effective
        uint32_t permitted
        uint32_t inheritable

    int compart_pidfd
    int compart_dispatch_works
    long compart_clone() nogil
    void compart_block_signals(sigset_t *before)
    void compart_default_signals()
    int compart_install_trap()
    int compart_drop_shared()
    int compart_heap_lives()
    void compart_few_arenas()
    int compart_limit_memory(unsigned long long budget)
    cdef struct rlimit:
        unsigned long rlim_cur
        unsigned long rlim_max
    cdef struct pollfd:
        int fd
        short events
        short revents
    int c_getrlimit "getrlimit"(int which, rlimit *limit)
    int c_poll "poll"(pollfd *wanted, unsigned long count, int milliseconds) nogil
    int c_pipe2 "pipe2"(int *pair, int flags)
    int c_fcntl "fcntl"(int fd, int command, int value)
    int c_close "close"(int fd)
    int O_CLOEXEC, O_NONBLOCK, F_SETFL, POLLIN
    int c_socketpair "socketpair"(int domain, int kind, int protocol, int *pair)
    long compart_seccomp(unsigned op, unsigned flags, void *arg)
    long compart_step(long step, long a, long b, long c, long d)

    int AF_UNIX, SOCK_SEQPACKET, SOCK_CLOEXEC
    int SIG_SETMASK
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
    int errno
    int EINTR
    int EAGAIN
    int ENOENT
    int ENOSYS
    int EFAULT
    int clearenv()
    int getpid()
    long syscall(long number, ...) nogil
    int c_ioctl "ioctl"(int fd, unsigned long request, void *arg) nogil
    int c_prctl "prctl"(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
    int c_setns "setns"(int fd, int kind)
    int c_unshare "unshare"(int flags)
    int c_mount "mount"(const char *source, const char *target, const char *fstype, unsigned long flags, const void *data)
    int c_umount2 "umount2"(const char *target, int flags)
    int c_chroot "chroot"(const char *path)
    int c_madvise "madvise"(void *address, size_t length, int advice)
    void *c_mmap "mmap"(void *address, size_t length, int prot, int flags, int fd, long offset)
    int c_munmap "munmap"(void *address, size_t length)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_SHARED, MAP_ANONYMOUS, MAP_POPULATE, MADV_DONTFORK, MADV_DONTDUMP
    ssize_t c_process_vm_readv "process_vm_readv"(int pid, const iovec *local, unsigned long nlocal,
                                                 const iovec *remote, unsigned long nremote, unsigned long flags)
    long SYS_tgkill
    long SYS_waitid, SYS_pidfd_send_signal, SYS_close_range, SYS_openat2, SYS_capset, SYS_pivot_root
    long SYS_open_tree, SYS_move_mount, SYS_fsopen, SYS_fsconfig, SYS_fsmount, SYS_mount_setattr
    long SYS_landlock_create_ruleset, SYS_landlock_add_rule, SYS_landlock_restrict_self
    int P_PIDFD, WEXITED, __WALL, WNOHANG
    int PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, PR_SET_DUMPABLE
    unsigned SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, SECCOMP_GET_ACTION_AVAIL
    unsigned long SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND, SECCOMP_IOCTL_NOTIF_ID_VALID, SECCOMP_IOCTL_NOTIF_ADDFD

cdef extern from "Python.h":
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Parent()
    void PyOS_AfterFork_Child()
    unsigned long PyThread_get_thread_ident()


cdef unsigned long forker = 0


cdef inline long checked(long result) except -1:
    if result == -1:
        PyErr_SetFromErrno(OSError)
        return -1
    return result


# ---- processes ----------------------------------------------------------------------------------------------


def fork(bint probe_heap=False, list into=None):
    """fork(2), as clone(2) with CLONE_PIDFD and no exit signal.

    Returns (pid, pidfd) in the parent and (0, -1) in the child, where every signal is still blocked. The
    child sends no SIGCHLD and is found by no wait that lacks __WALL. `probe_heap` makes a child that was
    forked beside other threads without libc's help prove that malloc is usable. `into` gets the pair as well, before any
    signal handler of the host can run.
    """
    cdef sigset_t before
    cdef long pid
    cdef int failed, pidfd
    global forker
    compart_block_signals(&before)
    PyOS_BeforeFork()
    # From here to the fork this thread keeps the GIL; before, another one may have forked.
    forker = PyThread_get_thread_ident()
    pid = compart_clone()
    failed = errno
    if pid != 0:
        forker = 0
    # Taken now: the handlers after the fork are Python, and another thread may fork while they run.
    pidfd = compart_pidfd
    if pid == 0:
        if probe_heap and compart_dispatch_works != 1:
            compart_heap_lives()
        PyOS_AfterFork_Child()
        return 0, -1
    if pid > 0 and into is not None:
        # Kept where the caller finds it even if an interrupt is what this call returns with.
        into.append((pid, pidfd))
    PyOS_AfterFork_Parent()
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if pid == -1:
        raise OSError(failed, "fork failed")
    return pid, pidfd


def in_own_fork():
    """Whether this process is a child that fork() above made, for handlers that run after any fork."""
    return forker != 0 and forker == PyThread_get_thread_ident()


def fork_runs_handlers():
    """Whether the last fork() went through libc, with pthread_atfork handlers: True, False, or None before the first."""
    return None if compart_dispatch_works == -1 else compart_dispatch_works == 1


def waitid(int pidfd, bint block=True):
    """waitid(2) with P_PIDFD: reap our own child.

    Returns (si_code, si_status, user seconds, system seconds, peak resident bytes), or None when the child still
    runs and `block` is false.
    """
    cdef siginfo_t info
    cdef rusage used
    cdef long result
    cdef int flags = WEXITED | __WALL
    if not block:
        flags |= WNOHANG
    while True:
        info.si_pid = 0
        with nogil:
            result = syscall(SYS_waitid, P_PIDFD, pidfd, &info, flags, &used)
        if result == 0:
            break
        if errno != EINTR:
            checked(result)
        PyErr_CheckSignals()
    if info.si_pid == 0:
        return None
    return (info.si_code, info.si_status,
            used.ru_utime.tv_sec + used.ru_utime.tv_usec * 1e-6,
            used.ru_stime.tv_sec + used.ru_stime.tv_usec * 1e-6,
            used.ru_maxrss * 1024)


def pidfd_send_signal(int pidfd, int number):
    """pidfd_send_signal(2)"""
    checked(syscall(SYS_pidfd_send_signal, pidfd, number, NULL, 0))


def tgkill(int pid, int tid, int number):
    """tgkill(2)"""
    checked(syscall(SYS_tgkill, pid, tid, number))


def few_arenas():
    """mallopt(3) M_ARENA_MAX: glibc reserves 64 MiB of address space for each arena, which a memory limit counts."""
    compart_few_arenas()


def default_signals():
    """sigaction(2) and sigprocmask(2): every handler to its default, SIGINT and SIGPIPE ignored, nothing blocked."""
    compart_default_signals()


def clear_environ():
    """clearenv(3)"""
    clearenv()


def drop_shared_mappings():
    """mmap(2) over every shared mapping that could be written. Returns how many were dropped."""
    return checked(compart_drop_shared())


def limit_memory(unsigned long long budget):
    """setrlimit(2) RLIMIT_AS to `budget` bytes above what is in use now"""
    checked(compart_limit_memory(budget))


def pipes(int count, list readers, list writers):
    """pipe2(2): `count` pipes, close-on-exec, the reading ends non-blocking. The caller's lists own them, also on an error."""
    cdef int pair[2]
    cdef int i
    for i in range(count):
        checked(c_pipe2(&pair[0], O_CLOEXEC))
        readers.append(pair[0])
        writers.append(pair[1])
        checked(c_fcntl(pair[0], F_SETFL, O_NONBLOCK))


def close_all(list descriptors):
    """close(2) for each that is not negative; the list is emptied."""
    cdef int number
    for number in descriptors:
        if number >= 0:
            c_close(number)
    descriptors.clear()


def settle(list descriptors, int result, int pidfd, int milliseconds):
    """What a parent does after a fork: close(2) the child's ends, then poll(2) until one of the two is readable.

    In C: what Python touches here for the first time is copied, as the child still shares it, and while both copy they
    hinder each other. True when `result` is readable; a signal ends the wait early.
    """
    cdef pollfd wanted[2]
    close_all(descriptors)
    wanted[0].fd = result
    wanted[1].fd = pidfd
    wanted[0].events = wanted[1].events = POLLIN
    wanted[0].revents = wanted[1].revents = 0
    if milliseconds:
        with nogil:
            c_poll(&wanted[0], 2, milliseconds)
    return wanted[0].revents != 0


cdef list forked_callbacks = []


def _after_fork():
    if not in_own_fork():
        for callback in forked_callbacks:
            callback()


def at_fork(callback):
    """fork(2): call `callback` in every child of this process but those that fork() here makes, which need none of it."""
    if not forked_callbacks:
        os.register_at_fork(after_in_child=_after_fork)
    forked_callbacks.append(callback)


def limits():
    """getrlimit(2) of every resource, as bytes to compare."""
    cdef rlimit all[16]
    cdef int which
    for which in range(16):
        c_getrlimit(which, &all[which])
    return PyBytes_FromStringAndSize(<char *>&all[0], sizeof(all))


def socketpair(list ours, list theirs):
    """socketpair(2): AF_UNIX, SOCK_SEQPACKET, close-on-exec; ours non-blocking. The caller's lists own them."""
    cdef int pair[2]
    checked(c_socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
    ours.append(pair[0])
    theirs.append(pair[1])
    checked(c_fcntl(pair[0], F_SETFL, O_NONBLOCK))


def close_range(unsigned int first, unsigned int last):
    """close_range(2)"""
    checked(syscall(SYS_close_range, first, last, 0))


def prctl(int option, unsigned long a=0, unsigned long b=0, unsigned long c=0, unsigned long d=0):
    """prctl(2)"""
    return checked(c_prctl(option, a, b, c, d))


def drop_capabilities():
    """capset(2) to nothing, and prctl(2) PR_CAP_AMBIENT_CLEAR_ALL"""
    cdef compart_cap_header header
    cdef compart_cap_data data[2]
    cdef int i
    c_prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header.version = 0x20080522
    header.pid = 0
    for i in range(2):
        data[i].effective = 0
        data[i].permitted = 0
        data[i].inheritable = 0
    checked(syscall(SYS_capset, &header, &data[0]))


def setns(int fd, int kind):
    """setns(2)"""
    checked(c_setns(fd, kind))


def unshare(int flags):
    """unshare(2)"""
    checked(c_unshare(flags))


def run(bytes script, bytes data):
    """syscall(2), again and again: a prepared list of calls, carried out without touching a Python object.

    `script` is an array of struct { int64 number, must; int64 args[5] }, of which the arguments flagged in the high half
    of `must` (bit 32 + n) are offsets into `data`. A call that fails ends the list when the low bit of `must` is set.
    Negative numbers are steps of ours that are more than one call. Returns (index, errno) of the call that failed, or None.
    """
    cdef const long long *at = <const long long *><const char *>script
    cdef const char *base = data
    cdef Py_ssize_t n = len(script) // 56
    cdef Py_ssize_t i
    cdef int k
    cdef long a[5]
    cdef long result
    for i in range(n):
        for k in range(5):
            a[k] = <long>at[2 + k]
            if (at[1] >> (32 + k)) & 1:
                a[k] += <long>base
        if at[0] < 0:
            result = compart_step(<long>at[0], a[0], a[1], a[2], a[3])
        else:
            result = syscall(<long>at[0], a[0], a[1], a[2], a[3], a[4])
        if result == -1 and at[1] & 1:
            return i, errno
        at += 7
    return None


# ---- files and mounts -----------------------------------------------------------------------------------------


def openat2(int dirfd, bytes path, uint64_t flags, uint64_t mode, uint64_t resolve):
    """openat2(2). Returns a descriptor; pass O_CLOEXEC yourself."""
    cdef compart_open_how how
    cdef const char *name = path
    how.flags = flags
    how.mode = mode
    how.resolve = resolve
    return checked(syscall(SYS_openat2, dirfd, name, &how, sizeof(how)))


def open_tree(int dirfd, bytes path, unsigned int flags):
    """open_tree(2)"""
    cdef const char *name = path
    return checked(syscall(SYS_open_tree, dirfd, name, flags))


def move_mount(int from_fd, bytes from_path, int to_fd, bytes to_path, unsigned int flags):
    """move_mount(2)"""
    cdef const char *source = from_path
    cdef const char *target = to_path
    checked(syscall(SYS_move_mount, from_fd, source, to_fd, target, flags))


def fsopen(bytes fstype):
    """fsopen(2), close-on-exec"""
    cdef const char *name = fstype
    return checked(syscall(SYS_fsopen, name, 1))


def fsconfig(int fd, unsigned int command, key=None, value=None):
    """fsconfig(2) with a string key and value, both bytes or None"""
    cdef const char *k = NULL
    cdef const char *v = NULL
    if key is not None:
        k = key
    if value is not None:
        v = value
    checked(syscall(SYS_fsconfig, fd, command, k, v, 0))


def fsmount(int fd, unsigned int attributes):
    """fsmount(2), close-on-exec"""
    return checked(syscall(SYS_fsmount, fd, 1, attributes))


def mount_setattr(int fd, bytes path, unsigned int flags, uint64_t set_, uint64_t clear, uint64_t propagation=0):
    """mount_setattr(2)"""
    cdef compart_mount_attr attributes
    cdef const char *name = path
    attributes.set = set_
    attributes.clr = clear
    attributes.propagation = propagation
    attributes.userns_fd = 0
    checked(syscall(SYS_mount_setattr, fd, name, flags, &attributes, sizeof(attributes)))


def mount(bytes target, unsigned long flags):
    """mount(2) with flags alone, for changing propagation"""
    checked(c_mount(NULL, target, NULL, flags, NULL))


def umount2(bytes target, int flags):
    """umount2(2)"""
    checked(c_umount2(target, flags))


def pivot_root(bytes new, bytes old):
    """pivot_root(2)"""
    cdef const char *a = new
    cdef const char *b = old
    checked(syscall(SYS_pivot_root, a, b))


# ---- Landlock ---------------------------------------------------------------------------------------------------


def landlock_abi():
    """landlock_create_ruleset(2) with LANDLOCK_CREATE_RULESET_VERSION: the ABI, or 0 where there is no Landlock."""
    cdef long version = syscall(SYS_landlock_create_ruleset, NULL, 0, 1)
    return version if version > 0 else 0


def landlock_create_ruleset(uint64_t fs, uint64_t net, uint64_t scoped, size_t size):
    """landlock_create_ruleset(2); `size` is the part of the structure that the kernel's ABI knows: 8, 16 or 24"""
    cdef compart_landlock_ruleset ruleset
    ruleset.fs = fs
    ruleset.net = net
    ruleset.scoped = scoped
    return checked(syscall(SYS_landlock_create_ruleset, &ruleset, size, 0))


def landlock_add_path(int ruleset, int fd, uint64_t access):
    """landlock_add_rule(2) with LANDLOCK_RULE_PATH_BENEATH"""
    cdef compart_landlock_path rule
    rule.access = access
    rule.fd = fd
    checked(syscall(SYS_landlock_add_rule, ruleset, 1, &rule, 0))


def landlock_restrict_self(int ruleset, unsigned int flags=0):
    """landlock_restrict_self(2)"""
    checked(syscall(SYS_landlock_restrict_self, ruleset, flags))


# ---- seccomp ------------------------------------------------------------------------------------------------------


def seccomp_action_available(uint32_t action):
    """seccomp(2) SECCOMP_GET_ACTION_AVAIL"""
    return compart_seccomp(SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0


def seccomp_flags_known(unsigned int flags):
    """seccomp(2) with a null program: EFAULT says that the kernel knows the flags, EINVAL that it does not."""
    compart_seccomp(SECCOMP_SET_MODE_FILTER, flags, NULL)
    return errno == EFAULT


def seccomp(bytes program, unsigned int flags):
    """seccomp(2) SECCOMP_SET_MODE_FILTER. Returns the listener when the flag asks for one, else 0."""
    cdef sock_fprog filter
    filter.len = <unsigned short>(len(program) // 8)
    filter.filter = <sock_filter *><char *>program
    return checked(compart_seccomp(SECCOMP_SET_MODE_FILTER, flags, &filter))


def seccomp_notify_receive(int listener):
    """seccomp_unotify(2) SECCOMP_IOCTL_NOTIF_RECV: (id, thread id, number, architecture, instruction, six arguments).

    None when the caller went away meanwhile.
    """
    cdef seccomp_notif n
    cdef int result
    cdef unsigned char *raw = <unsigned char *>&n
    cdef size_t i
    for i in range(sizeof(n)):
        raw[i] = 0
    with nogil:
        result = c_ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &n)
    if result == -1:
        if errno == ENOENT or errno == EINTR or errno == EAGAIN:
            return None
        checked(result)
    return (n.id, n.pid, n.data.nr, n.data.arch, n.data.instruction_pointer,
            (n.data.args[0], n.data.args[1], n.data.args[2], n.data.args[3], n.data.args[4], n.data.args[5]))


def seccomp_notify_send(int listener, uint64_t ident, long long value, int error, uint32_t flags):
    """seccomp_unotify(2) SECCOMP_IOCTL_NOTIF_SEND. False when the caller went away meanwhile."""
    cdef seccomp_notif_resp answer
    answer.id = ident
    answer.val = value
    answer.error = -error
    answer.flags = flags
    if c_ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer) == -1:
        if errno == ENOENT:
            return False
        checked(-1)
    return True


def seccomp_notify_valid(int listener, uint64_t ident):
    """seccomp_unotify(2) SECCOMP_IOCTL_NOTIF_ID_VALID"""
    return c_ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &ident) == 0


def seccomp_notify_addfd(int listener, uint64_t ident, int fd, uint32_t flags, uint32_t newfd, uint32_t newfd_flags):
    """seccomp_unotify(2) SECCOMP_IOCTL_NOTIF_ADDFD"""
    cdef seccomp_notif_addfd add
    add.id = ident
    add.flags = flags
    add.srcfd = fd
    add.newfd = newfd
    add.newfd_flags = newfd_flags
    return checked(c_ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add))


def install_trap():
    """sigaction(2) for SIGSYS: newfstatat with an empty path is repeated as fstat."""
    checked(compart_install_trap())


# ---- memory -------------------------------------------------------------------------------------------------------


def process_vm_readv(int pid, uint64_t address, size_t length):
    """process_vm_readv(2): at most `length` bytes from another process, fewer where its memory ends."""
    cdef iovec local, remote
    cdef ssize_t got
    cdef bytes into = PyBytes_FromStringAndSize(NULL, length)
    local.iov_base = <char *>into
    local.iov_len = length
    remote.iov_base = <void *>address
    remote.iov_len = length
    got = c_process_vm_readv(pid, &local, 1, &remote, 1, 0)
    if got == -1:
        checked(-1)
    return into[:got]


cdef class Mapping:
    """mmap(2): pages with the buffer protocol that no forked child inherits (madvise(2) MADV_DONTFORK).

    `Mapping(fd, length)` maps a descriptor shared and writable; fd -1 gives private anonymous memory.
    """

    cdef void *address
    cdef readonly size_t length
    cdef Py_ssize_t exports
    cdef int owner

    def __cinit__(self, int fd, size_t length, *, bint populate=False):
        self.owner = getpid()
        cdef int flags = (MAP_PRIVATE | MAP_ANONYMOUS) if fd == -1 else MAP_SHARED
        if populate:
            flags |= MAP_POPULATE
        self.address = c_mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd, 0)
        if self.address == MAP_FAILED:
            self.address = NULL
            PyErr_SetFromErrno(OSError)
        self.length = length
        if c_madvise(self.address, length, MADV_DONTFORK) == -1:
            checked(-1)

    def hide_from_dumps(self):
        """madvise(2) MADV_DONTDUMP"""
        checked(c_madvise(self.address, self.length, MADV_DONTDUMP))

    def close(self):
        """munmap(2). BufferError while a view of the pages is alive."""
        if self.exports:
            raise BufferError("a view of this mapping is alive")
        if self.address != NULL:
            c_munmap(self.address, self.length)
            self.address = NULL

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.address == NULL:
            raise ValueError("the mapping is closed")
        from_memory(view, self, self.address, <Py_ssize_t>self.length, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def __dealloc__(self):
        # In a forked child the pages are not there, and something else may be.
        if self.address != NULL and self.owner == getpid():
            c_munmap(self.address, self.length)


cdef class View:
    """A mapping's memory, exported read-only; whatever is made from it keeps this object alive."""

    cdef readonly Mapping mapping

    def __cinit__(self, Mapping mapping, *rest):
        self.mapping = mapping

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.mapping.address == NULL:
            raise ValueError("the mapping is closed")
        PyBuffer_FillInfo(view, self, self.mapping.address, <Py_ssize_t>self.mapping.length, 1, flags)


cdef extern from "Python.h":
    int PyBuffer_FillInfo(Py_buffer *view, object exporter, void *buf, Py_ssize_t len, int readonly, int flags) except -1


cdef inline int from_memory(Py_buffer *view, object exporter, void *address, Py_ssize_t length, int flags) except -1:
    return PyBuffer_FillInfo(view, exporter, address, length, 0, flags)
