package systemd

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"
)

func TestMessageIsReadAsItWasWritten(t *testing.T) {
	for _, m := range []message{
		{kind: methodCall, flags: noAutoStart, serial: 1, path: "/a/b", iface: "a.b", member: "C", destination: "d.e"},
		{kind: methodReturn, serial: 7, replyTo: 3, sender: ":1.5", destination: ":1.6", signature: "s", body: []byte{1, 0, 0, 0, 'x', 0}},
		{kind: errorReply, serial: 1 << 31, replyTo: 1, errorName: "a.b.No"},
		{kind: methodCall, serial: 2, path: "/", member: "X", signature: "h", fds: 1, body: []byte{0, 0, 0, 0}},
	} {
		got, err := readMessage(bytes.NewReader(m.bytes()))
		got.order = nil
		if len(m.body) == 0 {
			m.body = []byte{}
		}
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%+v is read as %+v, %v", m, got, err)
		}
	}
}

// What is read of any bytes reads the same when it is written anew.
func FuzzReadMessage(f *testing.F) {
	e := &encoder{}
	e.signature("s")
	e.string("web.service")
	m := message{kind: methodReturn, serial: 7, replyTo: 3, sender: ":1.5", destination: ":1.6", signature: "v", body: e.data}
	f.Add(m.bytes())
	f.Add(message{kind: methodCall, serial: 1, path: "/a/b", iface: "a.b", member: "C", destination: "d.e", fds: 1}.bytes())
	f.Add(message{kind: errorReply, serial: 1, replyTo: 1, errorName: "a.b.No", signature: "s", body: []byte{1, 0, 0, 0, 'x', 0}}.bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := readMessage(bytes.NewReader(data))
		if err != nil {
			return
		}
		if len(m.body) > maxMessage {
			t.Fatalf("a body of %d bytes", len(m.body))
		}
		order := m.order
		m.order = binary.LittleEndian
		if len(m.signature) > 255 {
			t.Fatalf("a signature of %d bytes", len(m.signature))
		}
		again, err := readMessage(bytes.NewReader(m.bytes()))
		if err != nil || !reflect.DeepEqual(again, m) {
			t.Errorf("%+v is read again as %+v, %v", m, again, err)
		}
		m.order = order
		for _, signature := range []string{"v", "s", "o", "u", "osay"} {
			d := m.values(signature)
			var value string
			if signature == "v" {
				value = d.variant()
			} else {
				value = d.string()
			}
			if d.err == nil && len(value) > len(m.body) || d.err != nil && value != "" {
				t.Errorf("%q: %q, %v", signature, value, d.err)
			}
		}
	})
}
