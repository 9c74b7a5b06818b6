package ca

import (
	"net"

	"github.com/signet-id/signet/internal/adminsocket"
)

// socket is the configuration as the package that makes the socket wants it.
func (a AdminSocket) socket() adminsocket.Config {
	return adminsocket.Config{Path: a.Path, UIDs: a.UIDs, Group: a.Group}
}

// listenAdmin makes the admin socket with mode 0660 in a directory with mode 0750.
func (ca *CA) listenAdmin() (net.Listener, error) {
	return adminsocket.Listen(ca.c.AdminSocket.socket())
}

// admit lets the configured group and users reach the socket.
func (a AdminSocket) admit() error { return a.socket().Admit() }

// allowLocal: root, the CA's own user, and whom the configuration names; never the overflow uid.
func (ca *CA) allowLocal(uid, gid uint32, groups []uint32) bool {
	return ca.reconfigured.Load().AdminSocket.socket().Allows(uid, gid, groups)
}
