package proxy

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// The header of the PROXY protocol, version 2.
const (
	proxySignature = "\r\n\r\n\x00\r\nQUIT\n"
	proxyCommand   = 0x21 // version 2, PROXY
	proxyTCP4      = 0x11
	proxyTCP6      = 0x21
	// typeAuthority is the type of the value with the caller's SPIFFE ID. The protocol has it for the name that the peer gave of itself.
	typeAuthority = 0x02
)

// proxyHeader says from where to where a connection goes, and who the caller is.
func proxyHeader(from, to net.Addr, id string) ([]byte, error) {
	source, destination, err := addresses(from, to)
	if err != nil {
		return nil, err
	}
	b := append([]byte(proxySignature), proxyCommand, proxyTCP4)
	if source.Addr().Is6() {
		b[len(b)-1] = proxyTCP6
	}
	var rest []byte
	rest = append(rest, source.Addr().AsSlice()...)
	rest = append(rest, destination.Addr().AsSlice()...)
	rest = binary.BigEndian.AppendUint16(rest, source.Port())
	rest = binary.BigEndian.AppendUint16(rest, destination.Port())
	rest = append(rest, typeAuthority)
	rest = binary.BigEndian.AppendUint16(rest, uint16(len(id))) // an ID has at most 2048 bytes
	rest = append(rest, id...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(rest)))
	return append(b, rest...), nil
}

// addresses are both of one family.
func addresses(from, to net.Addr) (source, destination netip.AddrPort, err error) {
	f, ok := from.(*net.TCPAddr)
	t, ok2 := to.(*net.TCPAddr)
	if !ok || !ok2 {
		return source, destination, fmt.Errorf("a connection from %s to %s is no TCP connection", from, to)
	}
	source, destination = f.AddrPort(), t.AddrPort()
	if source.Addr().Unmap().Is4() && destination.Addr().Unmap().Is4() {
		return netip.AddrPortFrom(source.Addr().Unmap(), source.Port()), netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port()), nil
	}
	as6 := func(a netip.AddrPort) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().WithZone("").As16()), a.Port())
	}
	return as6(source), as6(destination), nil
}

// sendProxyHeader tells a backend about the caller of the connection.
func sendProxyHeader(to, from *wire, conn *tls.Conn, patience time.Duration) error {
	id := conn.ConnectionState().PeerCertificates[0].URIs[0].String() // a verified X509-SVID has exactly one
	b, err := proxyHeader(from.RemoteAddr(), from.LocalAddr(), id)
	if err != nil {
		return err
	}
	if err := to.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := to.Write(b); err != nil {
		return err
	}
	return to.SetWriteDeadline(time.Time{})
}
