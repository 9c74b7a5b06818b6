package systemd

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	busName      = "org.freedesktop.DBus"
	maxLine      = 1024 // while authenticating
	maxUnrelated = 32   // messages between a call and its reply
)

// errAbsent says that there is no bus, or nobody on it who would answer.
var errAbsent = errors.New("there is no systemd on the bus")

// A busError is an answer that says no.
type busError struct{ name, text string }

func (e *busError) Error() string { return fmt.Sprintf("%s: %.200s", e.name, e.text) }

// named says whether err is an answer of that name.
func named(err error, names ...string) bool {
	var e *busError
	if !errors.As(err, &e) {
		return false
	}
	for _, n := range names {
		if e.name == n {
			return true
		}
	}
	return false
}

// A bus is one connection to a message bus, for one goroutine.
type bus struct {
	conn     *net.UnixConn
	in       *bufio.Reader
	serial   uint32
	passesFD bool // file descriptors may be sent
}

// dial connects and introduces itself. The connection and all calls on it end with ctx.
func dial(ctx context.Context, socket string) (b *bus, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, errAbsent
	}
	if err != nil {
		return nil, err
	}
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("connection is a %T", conn)
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	b = &bus{conn: uc, in: bufio.NewReaderSize(uc, maxLine)}
	if err := b.authenticateAs(os.Geteuid()); err != nil {
		return nil, fmt.Errorf("authenticating to the bus: %w", err)
	}
	if _, err := b.call(busName, message{path: "/org/freedesktop/DBus", iface: busName, member: "Hello", destination: busName}); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *bus) close() { b.conn.Close() }

// authenticateAs says who we are, which the bus knows from the kernel. [D-Bus Specification, Authentication Protocol]
func (b *bus) authenticateAs(uid int) error {
	if err := b.say("\x00AUTH EXTERNAL " + hex.EncodeToString([]byte(strconv.Itoa(uid))) + "\r\n"); err != nil {
		return err
	}
	if line, err := b.line(); err != nil || !strings.HasPrefix(line, "OK ") {
		return refused(line, err)
	}
	if err := b.say("NEGOTIATE_UNIX_FD\r\n"); err != nil {
		return err
	}
	line, err := b.line()
	if err != nil || line != "AGREE_UNIX_FD" && !strings.HasPrefix(line, "ERROR") {
		return refused(line, err)
	}
	b.passesFD = line == "AGREE_UNIX_FD"
	return b.say("BEGIN\r\n")
}

func refused(line string, err error) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("it says %.80q", line)
}

func (b *bus) say(s string) error {
	_, err := b.conn.Write([]byte(s))
	return err
}

// line reads what the bus says, of at most maxLine bytes.
func (b *bus) line() (string, error) {
	line, err := b.in.ReadSlice('\n')
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(string(line), "\r\n"), nil
}

// call sends a call, with descriptors if it has any, and returns the reply to it.
//
// On a bus anybody can send anybody a message, also one that looks like a reply, unless the bus's policy forbids it. So
// what is not from the one who was asked, or from the bus itself that says no, is passed over.
func (b *bus) call(from string, m message, fds ...int) (message, error) {
	b.serial++
	m.kind, m.flags, m.serial, m.fds = methodCall, noAutoStart, b.serial, uint32(len(fds))
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	raw := m.bytes()
	n, _, err := b.conn.WriteMsgUnix(raw, rights, nil)
	if err == nil && n < len(raw) {
		_, err = b.conn.Write(raw[n:])
	}
	if err != nil {
		return message{}, fmt.Errorf("calling %s: %w", m.member, err)
	}
	for range maxUnrelated {
		reply, err := readMessage(b.in)
		if err != nil {
			return message{}, fmt.Errorf("the reply to %s: %w", m.member, err)
		}
		switch {
		case reply.replyTo != m.serial || reply.sender != from && reply.sender != busName:
		case reply.kind == methodReturn && reply.sender == from:
			return reply, nil
		case reply.kind == errorReply:
			e := &busError{name: reply.errorName}
			if strings.HasPrefix(reply.signature, "s") {
				d := &decoder{data: reply.body, order: reply.order}
				e.text = d.string()
			}
			return message{}, fmt.Errorf("%s: %w", m.member, e)
		}
	}
	return message{}, fmt.Errorf("the reply to %s: none among %d messages", m.member, maxUnrelated)
}

// ask calls a method of the bus itself.
func (b *bus) ask(member, name string) (message, error) {
	e := &encoder{}
	e.string(name)
	return b.call(busName, message{path: "/org/freedesktop/DBus", iface: busName, member: member, destination: busName, signature: "s", body: e.data})
}
