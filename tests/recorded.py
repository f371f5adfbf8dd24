"""What Macs print: the command output that tests of interfaces and of the doctor read."""

HARDWARE_PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: a8:20:66:00:00:01

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: a8:20:66:00:00:02

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 36:2d:83:00:00:c0

Hardware Port: Thunderbolt 2
Device: en3
Ethernet Address: 36:2d:83:00:00:c4

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:2d:83:00:00:c0

Hardware Port: Thunderbolt Ethernet Slot 1
Device: en7
Ethernet Address: 24:5e:be:00:00:85

Hardware Port: USB 10/100/1000 LAN
Device: en8
Ethernet Address: 00:e0:4c:00:00:01

Hardware Port: Bluetooth PAN
Device: en9
Ethernet Address: a8:20:66:00:00:03

VLAN Configurations
===================
"""

IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
	options=1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>
	inet 127.0.0.1 netmask 0xff000000
	inet6 ::1 prefixlen 128
	inet6 fe80::1%lo0 prefixlen 64 scopeid 0x1
	nd6 options=201<PERFORMNUD,DAD>
gif0: flags=8010<POINTOPOINT,MULTICAST> mtu 1280
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
	options=50b<RXCSUM,TXCSUM,VLAN_HWTAGGING,AV,CHANNEL_IO>
	ether a8:20:66:00:00:01
	inet 192.168.7.9 netmask 0xffffff00 broadcast 192.168.7.255
	media: autoselect (none)
	status: inactive
en1: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
	options=6460<TSO4,TSO6,CHANNEL_IO,PARTIAL_CSUM,ZEROINVERT_CSUM>
	ether a8:20:66:00:00:02
	inet6 fe80::1c2d:abcd:12:3456%en1 prefixlen 64 secured scopeid 0xb
	inet 192.168.1.7 netmask 0xffffff00 broadcast 192.168.1.255
	inet6 fd12:3456:789a::7 prefixlen 64 autoconf secured
	media: autoselect
	status: active
en2: flags=8963<UP,BROADCAST,SMART,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 9000
	options=460<TSO4,TSO6,CHANNEL_IO>
	ether 36:2d:83:00:00:c0
	media: autoselect <full-duplex>
	status: active
awdl0: flags=8943<UP,BROADCAST,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 1500
	ether 5e:1d:00:00:00:01
	inet6 fe80::5c1d:ff:fe00:1%awdl0 prefixlen 64 scopeid 0xe
	media: autoselect
	status: active
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 9000
	options=63<RXCSUM,TXCSUM,TSO4,TSO6>
	ether 36:2d:83:00:00:c0
	inet 10.10.0.2 netmask 0xffffff00 broadcast 10.10.0.255
	Configuration:
		id 0:0:0:0:0:0 priority 0 hellotime 0 fwddelay 0
		maxage 0 holdcnt 0 proto stp maxaddr 100 timeout 1200
	member: en2 flags=3<LEARNING,DISCOVER>
		ifmaxaddr 0 port 8 priority 0 path cost 0
	member: en3 flags=3<LEARNING,DISCOVER>
		ifmaxaddr 0 port 9 priority 0 path cost 0
	nd6 options=201<PERFORMNUD,DAD>
	media: <unknown type>
	status: active
utun3: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 1280
	inet 100.101.102.103 --> 100.101.102.103 netmask 0xffffffff
en7: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
	ether 24:5e:be:00:00:85
	inet 169.254.80.12 netmask 0xffff0000 broadcast 169.254.255.255
	media: autoselect (1000baseT <full-duplex>)
	status: active
"""

PMSET = """\
System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 womp                 1
 autorestart          0
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by powerd, bluetoothd)
 hibernatemode        0
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
"""

FIREWALL_ON = "Firewall is enabled. (State = 1)\n"
FIREWALL_OFF = "Firewall is disabled. (State = 0)\n"
