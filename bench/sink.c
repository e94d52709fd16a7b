/* The analyzers of the race: answers every request 200 as cheaply as it can and counts packets per port.
 *
 *   sink PORT...            one thread, epoll; GET /count answers "<packets> <requests>", GET anything else "ok"
 *
 * A request without X-Packet-Count carries one packet. Only what clients of this benchmark send is understood.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEAD_ROOM = 65536, READ = 262144, REPLIES = 262144 };
static const char OK[] = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";

struct listener { int fd; long packets, requests; };
struct connection {
    int fd;
    struct listener *on;
    size_t body_left;
    size_t kept;            /* bytes of a head that is not whole */
    char *head;
};

static char input[HEAD_ROOM + READ], output[REPLIES];

static long field(const char *head, size_t n, const char *name, long missing) {
    size_t length = strlen(name);
    for (const char *p = head; (p = memchr(p, '\n', head + n - p)) != NULL;) {
        p++;
        if ((size_t)(head + n - p) > length && strncasecmp(p, name, length) == 0 && p[length] == ':')
            return strtol(p + length + 1, NULL, 10);
    }
    return missing;
}

static size_t answer(struct connection *c, const char *head, size_t n, char *out) {
    if (memcmp(head, "GET", 3) == 0) {
        if (memcmp(head + 4, "/count", 6) != 0) {
            memcpy(out, OK, sizeof OK - 1);
            return sizeof OK - 1;
        }
        char text[64];
        int length = snprintf(text, sizeof text, "%ld %ld\n", c->on->packets, c->on->requests);
        return (size_t)sprintf(out, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", length, text);
    }
    c->on->packets += field(head, n, "X-Packet-Count", 1);
    c->on->requests++;
    c->body_left = (size_t)field(head, n, "Content-Length", 0);
    memcpy(out, OK, sizeof OK - 1);
    return sizeof OK - 1;
}

static int serve(struct connection *c) {
    memcpy(input, c->head, c->kept);
    ssize_t got = read(c->fd, input + c->kept, READ);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    char *p = input, *end = input + c->kept + got;
    size_t out = 0;
    c->kept = 0;
    while (p < end) {
        size_t body = c->body_left < (size_t)(end - p) ? c->body_left : (size_t)(end - p);
        p += body;
        c->body_left -= body;
        if (p == end) break;
        char *stop = memmem(p, (size_t)(end - p), "\r\n\r\n", 4);
        if (stop == NULL) {
            c->kept = (size_t)(end - p);
            if (c->kept > HEAD_ROOM) return -1;
            if (c->head == NULL && (c->head = malloc(HEAD_ROOM)) == NULL) return -1;
            memcpy(c->head, p, c->kept);
            break;
        }
        if (out > REPLIES - 256) {
            if (write(c->fd, output, out) != (ssize_t)out) return -1;
            out = 0;
        }
        out += answer(c, p, (size_t)(stop + 4 - p), output + out);
        p = stop + 4;
    }
    return out && write(c->fd, output, out) != (ssize_t)out ? -1 : 0;
}

int main(int argc, char **argv) {
    struct listener *listeners = calloc((size_t)argc, sizeof *listeners);
    int poll = epoll_create1(0), one = 1;
    signal(SIGPIPE, SIG_IGN);
    for (int i = 1; i < argc; i++) {
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[i]))};
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        listeners[i].fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        setsockopt(listeners[i].fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(listeners[i].fd, (struct sockaddr *)&address, sizeof address) || listen(listeners[i].fd, 4096)) {
            perror(argv[i]);
            return 1;
        }
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)i};
        epoll_ctl(poll, EPOLL_CTL_ADD, listeners[i].fd, &event);
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[512];
        int n = epoll_wait(poll, events, 512, -1);
        for (int k = 0; k < n; k++) {
            if (events[k].data.u64 < (uint64_t)argc) {
                struct listener *on = &listeners[events[k].data.u64];
                int fd = accept4(on->fd, NULL, NULL, SOCK_NONBLOCK);
                if (fd < 0) continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                struct connection *c = calloc(1, sizeof *c);
                c->fd = fd;
                c->on = on;
                struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
                epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
            } else {
                struct connection *c = events[k].data.ptr;
                if (serve(c) < 0) {
                    close(c->fd);
                    free(c->head);
                    free(c);
                }
            }
        }
    }
}
