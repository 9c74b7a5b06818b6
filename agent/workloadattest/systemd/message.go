package systemd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"unicode/utf8"
)

// A message is one of the D-Bus protocol, with the header fields that are used here. [D-Bus Specification, Message Protocol]
type message struct {
	kind        byte
	flags       byte
	serial      uint32
	replyTo     uint32
	path        string
	iface       string
	member      string
	errorName   string
	destination string
	sender      string
	signature   string
	fds         uint32
	order       binary.ByteOrder // of body; nil means little endian
	body        []byte
}

// Kinds of messages, and flags.
const (
	methodCall, methodReturn, errorReply, signal = 1, 2, 3, 4

	noAutoStart = 0x2
)

const (
	// maxMessage bounds what is read. The specification allows 128 MiB; the answers here have hundreds of bytes.
	maxMessage  = 64 << 10
	fixedHeader = 16
)

// errMalformed says that a message is not one.
var errMalformed = errors.New("malformed message on the bus")

// readMessage reads one message.
func readMessage(r io.Reader) (message, error) {
	var head [fixedHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return message{}, err
	}
	var order binary.ByteOrder
	switch head[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return message{}, fmt.Errorf("%w: byte order %q", errMalformed, head[0])
	}
	if head[3] != 1 {
		return message{}, fmt.Errorf("%w: protocol version %d", errMalformed, head[3])
	}
	m := message{kind: head[1], flags: head[2], serial: order.Uint32(head[8:]), order: order}
	bodyBytes, fieldBytes := int64(order.Uint32(head[4:])), int64(order.Uint32(head[12:]))
	padded := (fixedHeader + fieldBytes + 7) / 8 * 8
	if padded+bodyBytes > maxMessage {
		return message{}, fmt.Errorf("%w: it has %d bytes, and at most %d are read", errMalformed, padded+bodyBytes, maxMessage)
	}
	rest := make([]byte, padded-fixedHeader+bodyBytes)
	if _, err := io.ReadFull(r, rest); err != nil {
		return message{}, fmt.Errorf("reading a message of the bus: %w", err)
	}
	// Alignment counts from the start of the message; 16 bytes of it are gone, which changes nothing.
	fields := &decoder{data: rest[:fieldBytes], order: order}
	for fields.err == nil && fields.at < len(fields.data) {
		fields.align(8)
		m.field(fields)
	}
	if fields.err != nil {
		return message{}, fields.err
	}
	m.body = rest[padded-fixedHeader:]
	if m.kind < methodCall || m.kind > signal || m.serial == 0 || len(m.body) > 0 && m.signature == "" {
		return message{}, fmt.Errorf("%w: kind %d, serial %d, signature %q", errMalformed, m.kind, m.serial, m.signature)
	}
	return m, nil
}

// field reads one header field.
func (m *message) field(d *decoder) {
	code := d.byte()
	signature := d.signature()
	into := map[byte]*string{1: &m.path, 2: &m.iface, 3: &m.member, 4: &m.errorName, 6: &m.destination, 7: &m.sender}
	switch {
	case signature == "g" && code == 8:
		m.signature = d.signature()
	case signature == "g":
		d.signature()
	case signature == "u" && code == 5:
		m.replyTo = d.uint32()
	case signature == "u" && code == 9:
		m.fds = d.uint32()
	case signature == "u":
		d.uint32()
	case signature == "s" || signature == "o":
		s := d.string()
		if p := into[code]; p != nil {
			*p = s
		}
	default:
		d.fail("header field %d of type %.20q", code, signature)
	}
}

// bytes is the message as it is sent, in little endian.
func (m message) bytes() []byte {
	e := &encoder{}
	e.data = append(e.data, 'l', m.kind, m.flags, 1)
	e.uint32(uint32(len(m.body)))
	e.uint32(m.serial)
	e.uint32(0) // length of the fields, known below
	field := func(code byte, typ, value string) {
		if value == "" {
			return
		}
		e.align(8)
		e.data = append(e.data, code)
		e.signature(typ)
		if typ == "g" {
			e.signature(value)
		} else {
			e.string(value)
		}
	}
	number := func(code byte, value uint32) {
		if value == 0 {
			return
		}
		e.align(8)
		e.data = append(e.data, code)
		e.signature("u")
		e.uint32(value)
	}
	field(1, "o", m.path)
	field(2, "s", m.iface)
	field(3, "s", m.member)
	field(4, "s", m.errorName)
	number(5, m.replyTo)
	field(6, "s", m.destination)
	field(7, "s", m.sender)
	field(8, "g", m.signature)
	number(9, m.fds)
	binary.LittleEndian.PutUint32(e.data[12:], uint32(len(e.data)-fixedHeader))
	e.align(8)
	return append(e.data, m.body...)
}

// An encoder writes values in little endian.
type encoder struct{ data []byte }

func (e *encoder) align(n int) {
	for len(e.data)%n != 0 {
		e.data = append(e.data, 0)
	}
}

func (e *encoder) uint32(n uint32) {
	e.align(4)
	e.data = binary.LittleEndian.AppendUint32(e.data, n)
}

func (e *encoder) string(s string) {
	e.uint32(uint32(len(s)))
	e.data = append(append(e.data, s...), 0)
}

func (e *encoder) signature(s string) {
	e.data = append(append(append(e.data, byte(len(s))), s...), 0)
}

// A decoder reads values. After its first failure it returns zero values.
type decoder struct {
	data  []byte
	at    int
	order binary.ByteOrder
	err   error
}

// values returns a decoder for the body, which must have that signature.
func (m message) values(signature string) *decoder {
	d := &decoder{data: m.body, order: m.order}
	if d.order == nil {
		d.order = binary.LittleEndian
	}
	if m.signature != signature {
		d.fail("its values are %.20q and not %q", m.signature, signature)
	}
	return d
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, args...))
	}
}

func (d *decoder) take(n int) []byte {
	if d.err == nil && (n < 0 || n > len(d.data)-d.at) {
		d.fail("it ends too early")
	}
	if d.err != nil {
		return make([]byte, min(max(n, 0), 8))
	}
	d.at += n
	return d.data[d.at-n : d.at]
}

func (d *decoder) align(n int) {
	for d.err == nil && d.at%n != 0 {
		if d.take(1)[0] != 0 {
			d.fail("padding that is not zero")
		}
	}
}

func (d *decoder) byte() byte { return d.take(1)[0] }

func (d *decoder) uint32() uint32 {
	d.align(4)
	return d.order.Uint32(d.take(4))
}

func (d *decoder) string() string {
	return d.text(int(d.uint32()))
}

func (d *decoder) signature() string {
	return d.text(int(d.byte()))
}

// text reads n bytes and the zero after them.
func (d *decoder) text(n int) string {
	s := d.take(n)
	if zero := d.byte(); zero != 0 || slices.Contains(s, 0) || !utf8.Valid(s) {
		d.fail("a string that is none")
	}
	if d.err != nil {
		return ""
	}
	return string(s)
}

// variant reads a value that says its type, which must be a string.
func (d *decoder) variant() string {
	if s := d.signature(); s != "s" {
		d.fail("a value of type %.20q and not a string", s)
		return ""
	}
	return d.string()
}
